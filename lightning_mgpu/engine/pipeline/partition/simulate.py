"""Simulate a pipeline: start and end of each stage's work on each micro-batch.

An event simulation of `schedule`: a task begins as soon as its device is through with the task
before and what it needs has arrived. Links between stages send one micro-batch after another, while
stages compute.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.schedule import Task

# How many weights a stage has, about.
_PIECES = 4


class TimeSpan(NamedTuple):
    """Start and end in seconds after the first task's start."""

    start: float
    end: float


class Link(NamedTuple):
    """Transfer from one stage to another, which waits for it."""

    sender: int
    receiver: int


@dataclass(frozen=True)
class Load:
    """Durations of all work in forward and backward of a batch.

    Attributes:
        forward: Of each stage, the seconds it takes for each micro-batch.
        backward: The same for backward, but for what comes later.
        links: Of each link, the seconds that each micro-batch is on its way; gradients go back over
            the same links.
        weights: Of each stage, the seconds of each micro-batch for gradients of weights, which come
            when its device has nothing else to do; none: they are part of `backward`.
    """

    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]
    links: Mapping[Link, Sequence[float]]
    weights: Sequence[Sequence[float]] = ()


@dataclass
class SimulatedTimes:
    """Times of all tasks and transfers.

    Attributes:
        tasks: Of each task, its time.
        transfers: For each link and micro-batch, the time.
        later: For each task, when what it has left for later is done, piece by piece.
        seconds: Until all stages are done.
        devices: How many there are.
    """

    tasks: dict[Task, TimeSpan] = field(default_factory=dict)
    transfers: dict[tuple[Link, int], TimeSpan] = field(default_factory=dict)
    later: dict[Task, list[TimeSpan]] = field(default_factory=dict)
    seconds: float = 0.0
    devices: int = 0

    @property
    def busy(self) -> float:
        """Seconds that stages work, all together."""
        spans = itertools.chain(self.tasks.values(), *self.later.values())
        return sum(span.end - span.start for span in spans)


class BatchTimes(NamedTuple):
    """Times of forward and backward of a batch; all of forward ends before backward starts."""

    forward: SimulatedTimes
    backward: SimulatedTimes

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def waiting(self) -> float:
        """Share of time in which devices wait."""
        whole = self.forward.devices * self.seconds
        return 1 - (self.forward.busy + self.backward.busy) / whole if whole else 0.0


def passage(load: Load, devices: int | None = None) -> BatchTimes:
    """Simulate forward and backward of a batch.

    Args:
        load: What it consists of.
        devices: How many there are; stage `k` lies on device `k` modulo that. Default: one for each
            stage.
    """
    stages, chunks = len(load.forward), len(load.forward[0])
    count = devices or stages
    way = tuple(stage % count for stage in range(stages))
    ticks = [
        [Task(stage, chunk) for chunk, stage in tick]
        for tick in schedule.timetable(way, chunks, count).ticks
    ]
    back = {Link(link.receiver, link.sender): times for link, times in load.links.items()}
    return BatchTimes(
        run(ticks, load.forward, load.links, count),
        run(reversed(ticks), load.backward, back, count, load.weights),
    )


def run(
    ticks: Iterable[Iterable[Task]],
    seconds: Sequence[Sequence[float]],
    links: Mapping[Link, Sequence[float]],
    devices: int,
    weights: Sequence[Sequence[float]] = (),
) -> SimulatedTimes:
    """Simulate one direction.

    Args:
        ticks: The tasks, each after those that it needs; each device takes its own in this order.
        seconds: Of each stage, for each micro-batch.
        links: Of each link, the seconds on the way for each micro-batch.
        devices: How many there are.
        weights: Of each stage, the seconds for each micro-batch of what comes later.
    """
    incoming = _by(links, "receiver")
    outgoing = _by(links, "sender")
    free = [0.0] * devices
    line_free = dict.fromkeys(links, 0.0)
    made = SimulatedTimes(devices=devices)
    left = [_Later(made) for _ in range(devices)]
    for task in (task for tick in ticks for task in tick):
        stage, chunk = task
        device = stage % devices
        arrived = (made.transfers[link, chunk].end for link in incoming.get(stage, ()))
        needs = max(arrived, default=0.0)
        free[device] = left[device].until(needs, free[device])
        start = max(free[device], needs)
        end = free[device] = start + seconds[stage][chunk]
        if weights:
            free[device] = left[device].add(task, weights[stage][chunk], end)
        made.tasks[task] = TimeSpan(start, end)
        for link in outgoing.get(stage, ()):
            sent = max(end, line_free[link])
            line_free[link] = sent + links[link][chunk]
            made.transfers[link, chunk] = TimeSpan(sent, line_free[link])
    made.seconds = max(later.rest(at) for later, at in zip(left, free, strict=True))
    return made


class _Later:
    """What a device has left for later; the oldest comes first, in pieces."""

    def __init__(self, made: SimulatedTimes) -> None:
        self._made = made
        self._tasks: deque[tuple[Task, deque[float]]] = deque()

    def add(self, task: Task, seconds: float, now: float) -> float:
        """Leave work for later; returns when the device is free, which may have had too much."""
        self._tasks.append((task, deque([seconds / _PIECES] * _PIECES)))
        while len(self._tasks) > schedule.DEFERRED_VISITS:
            now = self._piece(now)
        return now

    def until(self, needs: float, now: float) -> float:
        """Work while there is time; returns when the device is free."""
        while self._tasks and now < needs:
            now = self._piece(now)
        return now

    def rest(self, now: float) -> float:
        """Do all that is left; returns when it is done."""
        while self._tasks:
            now = self._piece(now)
        return now

    def _piece(self, now: float) -> float:
        task, pieces = self._tasks[0]
        end = now + pieces.popleft()
        self._made.later.setdefault(task, []).append(TimeSpan(now, end))
        if not pieces:
            self._tasks.popleft()
        return end


def all_reduce(size: float, replicas: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of gradients over `replicas`.

    Args:
        size: Bytes of the gradients of each.
        replicas: How many.
        bandwidth: Bytes a second that each sends.
        latency: Seconds until the first byte of a message arrives.
    """
    steps = 2 * (replicas - 1)
    return steps * (size / replicas / bandwidth + latency)


def _by(links: Iterable[Link], end: str) -> dict[int, list[Link]]:
    found: dict[int, list[Link]] = {}
    for link in links:
        found.setdefault(getattr(link, end), []).append(link)
    return found
