"""The pipeline's timetable: which stage works on which micro-batch, and when.

Forward is that of GPipe (Huang et al., 2019): stage `s` works on micro-batch `t - s` at tick `t`.
Three stages and four micro-batches::

    tick     0    1    2    3    4    5
    stage 0  0    1    2    3
    stage 1       0    1    2    3
    stage 2            0    1    2    3

Backward is its mirror: it begins with the last stage and the last micro-batch.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__: list[str] = []


class Visit(NamedTuple):
    """A micro-batch's stay at a stage: its `number`-th of all, counted from 0."""

    chunk: int
    number: int


class Task(NamedTuple):
    """A stage's work on one micro-batch."""

    stage: int
    chunk: int


def forward(stages: int, chunks: int) -> Iterator[list[Task]]:
    """The tasks of each tick of a forward pass, which run at once."""
    for tick in range(stages + chunks - 1):
        first, last = max(0, tick - chunks + 1), min(tick, stages - 1)
        yield [Task(stage, tick - stage) for stage in range(first, last + 1)]


def backward(stages: int, chunks: int) -> Iterator[list[Task]]:
    """The tasks of each tick of a backward pass."""
    return reversed(list(forward(stages, chunks)))


class Timetable(NamedTuple):
    """Who is let in where.

    Attributes:
        orders: For each door, the visits it expects, in order.
        at_once: How many micro-batches are on their way at a time. Another sets out when one of
            them has come to its end.
    """

    orders: tuple[tuple[Visit, ...], ...]
    at_once: int


@functools.lru_cache(maxsize=64)
def timetable(way: tuple[int, ...], chunks: int, doors: int) -> Timetable:
    """The order in which micro-batches that all take the same way are let in.

    Each door takes the visit that can begin first, the furthest on its way if there are several:
    for a way that goes through each door once that is `forward`. No more micro-batches are on
    their way at once than it takes to be as quick as with all of them; each needs a thread.

    Args:
        way: The door of each visit, in order.
        chunks: Micro-batches.
        doors: How many doors there are.
    """
    shortest = len(_visits(way, chunks, chunks))
    for at_once in range(min(doors, chunks), chunks + 1):
        ticks = _visits(way, chunks, at_once)
        if len(ticks) == shortest:
            break
    made = [visit for tick in ticks for visit in tick]
    orders = (tuple(v for v in made if way[v.number] == door) for door in range(doors))
    return Timetable(tuple(orders), at_once)


def _visits(way: Sequence[int], chunks: int, at_once: int) -> list[list[Visit]]:
    """The visits of each tick."""
    ticks = []
    done = [0] * chunks
    while under_way := [chunk for chunk in range(chunks) if done[chunk] < len(way)][:at_once]:
        chosen: dict[int, Visit] = {}
        for chunk in under_way:
            number = done[chunk]
            known = chosen.get(way[number])
            if known is None or known.number < number:
                chosen[way[number]] = Visit(chunk, number)
        for visit in chosen.values():
            done[visit.chunk] += 1
        ticks.append(list(chosen.values()))
    return ticks


def of_stage(stage: int, timetable: Iterable[Iterable[Task]]) -> list[int]:
    """The micro-batches that one stage works on, in order."""
    return [task.chunk for tick in timetable for task in tick if task.stage == stage]


def bubble(stages: int, chunks: int) -> float:
    """The share of time in which a stage waits, if all take equally long."""
    return (stages - 1) / (chunks + stages - 1)


def waiting(seconds: Sequence[float], chunks: int) -> float:
    """The share of time in which stages wait, if each takes as long for every micro-batch.

    The slowest stage sets the pace: the others wait for it, beside the bubble.

    Args:
        seconds: What each stage takes for one micro-batch.
        chunks: Micro-batches.
    """
    whole = sum(seconds) + (chunks - 1) * max(seconds)
    return 1 - chunks * sum(seconds) / (len(seconds) * whole) if whole else 0.0
