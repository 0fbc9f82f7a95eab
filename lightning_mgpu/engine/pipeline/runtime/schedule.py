"""Timetable of a pipeline: the order in which micro-batches visit the stages.

Forward is that of GPipe (Huang et al., 2019): stage `s` works on micro-batch `t - s` at tick `t`.
Three stages and four micro-batches::

    tick     0    1    2    3    4    5
    stage 0  0    1    2    3
    stage 1       0    1    2    3
    stage 2            0    1    2    3

Backward is its mirror: it begins with the last stage and the last micro-batch::

    tick     6    7    8    9   10   11
    stage 0            3    2    1    0
    stage 1       3    2    1    0
    stage 2  3    2    1    0

Ticks are for planning only. What holds in a run is the order at each device (`turns`): nobody waits
for the end of a tick.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

DEFERRED_VISITS = 4
"""Of how many visits a door leaves gradients of weights for later.

One would do if stages were even. Each holds on to inputs, and to gradients of outputs.
"""

DEFERRED_RECOMPUTED_VISITS = 1
"""The same of visits that are computed again to save memory: inputs had been given up."""


class Visit(NamedTuple):
    """Visit of a micro-batch to a stage: its `number`-th of all, counted from 0."""

    chunk: int
    number: int


class Task(NamedTuple):
    """A stage's work on one micro-batch."""

    stage: int
    chunk: int


class Timetable(NamedTuple):
    """Order in which micro-batches enter the stages.

    Attributes:
        ticks: The visits of each tick, if all take equally long.
        orders: For each door, the visits it expects, in order.
        at_once: How many micro-batches are on their way at a time. Another sets out when one of
            them has come to its end.
    """

    ticks: tuple[tuple[Visit, ...], ...]
    orders: tuple[tuple[Visit, ...], ...]
    at_once: int


@functools.lru_cache(maxsize=64)
def timetable(way: tuple[int, ...], chunks: int, doors: int) -> Timetable:
    """Compute the order in which micro-batches of the same route visit the stages.

    For a way that goes through each door once that is GPipe's. On other ways, such as those of
    several stages on a device, a door lets in who is furthest on the way (depth first), or who is
    least far (breadth first, Lamy-Poirier, arXiv 2211.05953), whichever takes fewer ticks. Two
    stages on each of two devices and four micro-batches, depth first::

        tick    0    1    2    3    4    5    6    7    8
        door 0  0.0  1.0  0.2  1.2  2.0  3.0  2.2  3.2
        door 1       0.1  1.1  0.3  1.3  2.1  3.1  2.3  3.3      (micro-batch.stage)

    Few micro-batches are on their way at once, as many as it takes to be that quick (or up to twice
    as many), since each needs a thread.

    Args:
        way: The door of each visit, in order.
        chunks: Micro-batches.
        doors: How many doors there are.
    """
    shortest = min(len(_visits(way, chunks, chunks, first)) for first in (True, False))
    at_once = min(doors, chunks)
    ticks = _quickest(way, chunks, at_once)
    while len(ticks) > shortest:
        at_once = min(2 * at_once, chunks)
        ticks = _quickest(way, chunks, at_once)
    orders: list[list[Visit]] = [[] for _ in range(doors)]
    for visit in itertools.chain(*ticks):
        orders[way[visit.number]].append(visit)
    return Timetable(tuple(map(tuple, ticks)), tuple(map(tuple, orders)), at_once)


def _quickest(way: Sequence[int], chunks: int, at_once: int) -> list[list[Visit]]:
    """The visits of each tick, in the better of the two orders."""
    return min((_visits(way, chunks, at_once, first) for first in (True, False)), key=len)


def _visits(way: Sequence[int], chunks: int, at_once: int, depth_first: bool) -> list[list[Visit]]:
    """The visits of each tick."""
    ticks = []
    done = [0] * chunks
    while under_way := [chunk for chunk in range(chunks) if done[chunk] < len(way)][:at_once]:
        chosen: dict[int, Visit] = {}
        for chunk in under_way:
            number = done[chunk]
            known = chosen.get(way[number])
            if known is None or (number > known.number if depth_first else number < known.number):
                chosen[way[number]] = Visit(chunk, number)
        for visit in chosen.values():
            done[visit.chunk] += 1
        ticks.append(list(chosen.values()))
    return ticks


def waiting(
    seconds: Sequence[float], chunks: int, devices: int | None = None, deferred: bool = False
) -> float:
    """Share of time in which devices wait, if a stage takes equally long for each micro-batch.

    The slowest device sets the pace: the others wait for it, beside the bubble.

    Args:
        seconds: What each stage takes for one micro-batch.
        chunks: Micro-batches.
        devices: How many there are; stage `k` lies on device `k` modulo that. Default: one for each
            stage.
        deferred: Whether gradients of weights come later than those of inputs: a third of the work,
            for which no device waits.
    """
    count = devices or len(seconds)
    way = tuple(stage % count for stage in range(len(seconds)))
    free, arrived = [0.0] * count, [0.0] * chunks
    for tick in timetable(way, chunks, count).ticks:
        for chunk, stage in tick:
            end = max(free[way[stage]], arrived[chunk]) + seconds[stage]
            free[way[stage]] = arrived[chunk] = end
    whole = max(free)
    if deferred:
        busiest = max(sum(seconds[device::count]) for device in range(count))
        whole = (2 * whole + chunks * busiest) / 3
    return 1 - chunks * sum(seconds) / (count * whole) if whole else 0.0
