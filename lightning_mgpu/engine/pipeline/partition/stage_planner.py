"""Choose stages, micro-batches and what is computed again by the simulated time of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from math import comb
from statistics import median

from lightning_mgpu.engine.pipeline.partition import simulate
from lightning_mgpu.engine.pipeline.partition.choice import Layers, PartitionError
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, Measured
from lightning_mgpu.engine.pipeline.partition.memory import (
    DeviceMemory,
    MemoryLimit,
    MemoryModel,
    StagesInMemory,
)
from lightning_mgpu.engine.pipeline.partition.simulate import Link, Load
from lightning_mgpu.engine.pipeline.runtime.checkpointing import (
    Checkpoint,
    computed_again,
    per_stage,
)

NUMBERS = (1, 2, 3, 4)
"""Numbers of stages per device that are compared."""

# More stages have to be quicker by this much to be worth more hand-overs.
_MARGIN = 0.02
# Tasks that are simulated for a cut, about: some tenths of a second.
_TASKS = 10_000
# Seconds that no step takes.
_NEVER = 1e9


Deal = Callable[[Measured, int, int], tuple[Layers, list[int]] | None]
"""Distributes what was measured, for a number of micro-batches, to a number of stages."""


@dataclass(frozen=True)
class Candidate:
    """A way to run a module.

    Attributes:
        stages_per_device: How many stages lie on each device.
        chunks: Micro-batches.
        starts: The layers at which the second and later stages begin.
        checkpoint: Of each stage, which micro-batches are computed again in backward.
        seconds: Simulated time of forward and backward of a batch.
        memory: Of each device, if there is a limit.
        excess: Share of its memory that the fullest device has too little.
    """

    stages_per_device: int
    chunks: int
    starts: tuple[str, ...]
    checkpoint: tuple[Checkpoint, ...]
    seconds: float
    memory: tuple[DeviceMemory, ...] = ()
    excess: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """The candidate taken, and all of them, with the fewest stages and micro-batches first."""

    best: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class StagePlanner:
    """Compares cuts by the simulated time of a step.

    Args:
        devices: How many there are.
        numbers: Of stages per device, to be compared.
        hand_over: Measures the seconds, forward and backward, that it takes to hand a micro-batch
            of so many bytes on to another stage.
        free: Whether stages may begin wherever a step is shortest.
        least: Of how many multiplications gradients of weights come later; `None`: of none.
        checkpoint: Which micro-batches are computed again in backward at least, of each stage or
            of all.
        memory: Tells what each device has; `None`: enough.
        share: Returns what all processes are to take of what each has chosen.
    """

    devices: int
    numbers: Sequence[int]
    hand_over: Callable[[float], float]
    free: bool = True
    least: int | None = None
    checkpoint: Checkpoint | Sequence[Checkpoint] = "never"
    memory: Callable[[], MemoryLimit] | None = None
    share: Callable[[Chosen], Chosen] = lambda chosen: chosen

    def chosen(self, measured: Mapping[int, Measured], deal: Deal) -> Chosen | None:
        """Choose from measured costs.

        Args:
            measured: What was measured, by the number of micro-batches.
            deal: Distributes layers to stages; what is `free` may be moved from there.

        Returns:
            The choice; `None` if there are too few layers for any.

        Raises:
            PartitionError: Nothing fits into the devices' memory.
        """
        hand_over = {chunks: self._hand_over(found) for chunks, found in measured.items()}
        limit = None if self.memory is None else self.memory()
        found = (
            self._cut(measured[chunks], chunks, deal, number, hand_over[chunks], limit)
            for number in self.numbers
            for chunks in sorted(measured)
        )
        candidates = tuple(candidate for candidate in found if candidate is not None)
        if not candidates:
            return None
        fitting = [candidate for candidate in candidates if not candidate.excess]
        if not fitting:
            assert limit is not None
            raise PartitionError(self._too_little(candidates, limit))
        quickest = min(candidate.seconds for candidate in fitting)
        best = next(c for c in fitting if c.seconds <= (1 + _MARGIN) * quickest)
        return self.share(Chosen(best, candidates))

    def has_room(self, measured: Mapping[int, Measured], chunks: int) -> bool:
        """Return whether a device can hold what is kept while larger micro-batches are measured.

        Args:
            measured: What has been measured, by the number of micro-batches.
            chunks: How many the larger ones would be.
        """
        if self.memory is None:
            return True
        fewest = min(measured)
        whole = measured[fewest].costs[""]
        needed = whole.parameters + whole.activations * fewest / chunks
        return needed <= self.memory().size

    def _hand_over(self, measured: Measured) -> float:
        sizes = [cost.received for cost in measured.costs.values() if cost.received]
        return self.hand_over(median(sizes) if sizes else 0.0)

    def _cut(
        self,
        measured: Measured,
        chunks: int,
        deal: Deal,
        number: int,
        hand_over: float,
        limit: MemoryLimit | None,
    ) -> Candidate | None:
        """The best cut into a number of stages per device; `None` if there are too few layers."""
        stages = number * self.devices
        found = deal(measured, chunks, stages)
        if found is None:
            return None
        layers, counts = found
        names, costs = layers.names(), measured.costs
        row = [costs[name] for name in names]
        least = per_stage(self.checkpoint, stages)
        model = None
        if limit is not None:
            model = MemoryModel(limit, costs, names, self.devices, chunks)

        def candidate(bounds: Sequence[int]) -> Candidate:
            kept = StagesInMemory(least, ()) if model is None else model.fitted(bounds, least)
            return Candidate(
                stages_per_device=number,
                chunks=chunks,
                starts=tuple(names[first] for first in bounds[1:-1]),
                checkpoint=kept.checkpoint,
                seconds=self._seconds(row, bounds, chunks, kept.checkpoint, hand_over),
                memory=kept.devices,
                excess=0.0 if model is None else model.excess(kept.devices),
            )

        def price(bounds: Sequence[int]) -> float:
            found = candidate(bounds)
            return found.seconds if not found.excess else _NEVER * (1 + found.excess)

        bounds = [0, *accumulate(counts)]
        if self.free:
            bounds = quickest_cut(bounds, price, tries(len(counts), chunks))
        return candidate(bounds)

    def _seconds(
        self,
        row: Sequence[Cost],
        bounds: Sequence[int],
        chunks: int,
        checkpoint: Sequence[Checkpoint],
        hand_over: float,
    ) -> float:
        """Simulated time of a batch."""
        stages = [sum(row[a:b], Cost()) for a, b in pairwise(bounds)]
        forward, backward, weights = [], [], []
        for number, cost in enumerate(stages):
            handing = hand_over / 2 if number else 0.0
            again = computed_again(checkpoint[number], chunks)
            of_inputs = cost.seconds - cost.forward - cost.weights + handing
            forward.append([cost.forward + handing] * chunks)
            backward.append(
                [of_inputs + (cost.forward if chunk < again else 0.0) for chunk in range(chunks)]
            )
            weights.append([cost.weights] * chunks)
        # What the way takes is part of what the receiver does.
        links = {Link(*pair): [0.0] * chunks for pair in pairwise(range(len(stages)))}
        return simulate.passage(Load(forward, backward, links, weights), self.devices).seconds

    def _too_little(self, candidates: Iterable[Candidate], limit: MemoryLimit) -> str:
        best = min(candidates, key=lambda candidate: candidate.excess)
        device, taken = max(enumerate(best.memory), key=lambda pair: pair[1].total)
        return (
            f"`memory` of {_readable(limit.size)} for each device is too little. Even with what"
            f" takes least (stages per device: {best.stages_per_device}, micro-batches:"
            f" {best.chunks}, computed again in backward: whatever saves memory), device {device}"
            f" takes {_readable(taken.total)}: {_readable(taken.weights)} for parameters,"
            f" gradients and the optimizer, {_readable(taken.activations)} for activations. Use"
            " more devices, smaller batches, or an optimizer that keeps less."
        )


def tries(stages: int, chunks: int) -> int:
    """How many cuts may be simulated to find the best."""
    return _TASKS // (stages * chunks)


def _readable(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def quickest_cut(
    bounds: list[int], seconds: Callable[[Sequence[int]], float], most: int
) -> list[int]:
    """Find the bounds of stages with which a step is quickest.

    Args:
        bounds: Those to start with; the first and the last are fixed.
        seconds: What a step takes.
        most: About how many others may be tried: all, or else those that are better and better.
    """
    inner = range(1, len(bounds) - 1)
    if comb(bounds[-1] - 1, len(inner)) <= most:
        every = combinations(range(1, bounds[-1]), len(inner))
        return min([bounds, *([0, *cuts, bounds[-1]] for cuts in every)], key=seconds)
    best, moved = seconds(bounds), True
    while moved and most > 0:
        moved = False
        # One bound a layer further, or both of a stage.
        for which in (*((index,) for index in inner), *pairwise(inner)):
            for step in (-1, 1):
                tried = [b + step * (index in which) for index, b in enumerate(bounds)]
                if all(a < b for a, b in pairwise(tried)):
                    found, most = seconds(tried), most - 1
                    if found < best * (1 - 1e-6):
                        bounds, best, moved = tried, found, True
    return bounds
