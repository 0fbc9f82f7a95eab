"""Simulate a pipeline: start and end of each stage's work on each micro-batch.

An event simulation of `schedule`: a task begins as soon as its device is through with the task
before and what it needs has arrived. Links between stages send one micro-batch after another, while
stages compute.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.schedule import Task


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
        backward: The same for backward.
        links: Of each link, the seconds that each micro-batch is on its way; gradients go back over
            the same links.
    """

    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]
    links: Mapping[Link, Sequence[float]]


@dataclass
class SimulatedTimes:
    """Times of all tasks and transfers.

    Attributes:
        tasks: Of each task, its time.
        transfers: For each link and micro-batch, the time.
        seconds: Until all stages are done.
        devices: How many there are.
    """

    tasks: dict[Task, TimeSpan] = field(default_factory=dict)
    transfers: dict[tuple[Link, int], TimeSpan] = field(default_factory=dict)
    seconds: float = 0.0
    devices: int = 0

    @property
    def busy(self) -> float:
        """Seconds that stages work, all together."""
        return sum(span.end - span.start for span in self.tasks.values())


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
        run(reversed(ticks), load.backward, back, count),
    )


def run(
    ticks: Iterable[Iterable[Task]],
    seconds: Sequence[Sequence[float]],
    links: Mapping[Link, Sequence[float]],
    devices: int,
) -> SimulatedTimes:
    """Simulate one direction.

    Args:
        ticks: The tasks, each after those that it needs; each device takes its own in this order.
        seconds: Of each stage, for each micro-batch.
        links: Of each link, the seconds on the way for each micro-batch.
        devices: How many there are.
    """
    incoming = _by(links, "receiver")
    outgoing = _by(links, "sender")
    free = [0.0] * devices
    line_free = dict.fromkeys(links, 0.0)
    made = SimulatedTimes(devices=devices)
    for task in (task for tick in ticks for task in tick):
        stage, chunk = task
        arrived = (made.transfers[link, chunk].end for link in incoming.get(stage, ()))
        start = max(free[stage % devices], *arrived, 0.0)
        end = free[stage % devices] = start + seconds[stage][chunk]
        made.tasks[task] = TimeSpan(start, end)
        for link in outgoing.get(stage, ()):
            sent = max(end, line_free[link])
            line_free[link] = sent + links[link][chunk]
            made.transfers[link, chunk] = TimeSpan(sent, line_free[link])
    made.seconds = max(free)
    return made


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
