"""Choose the number of stages per device, and the cut, by the simulated time of a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from math import comb
from statistics import median
from typing import Literal

from lightning_mgpu.engine.pipeline.partition import choice, simulate
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost
from lightning_mgpu.engine.pipeline.partition.observation import ModuleCall
from lightning_mgpu.engine.pipeline.partition.simulate import Link, Load

NUMBERS = (1, 2, 3, 4)
"""Numbers of stages per device that are compared."""

# More stages have to be quicker by this much to be worth more hand-overs.
_MARGIN = 0.02
# Tasks that are simulated for each number of stages, about: some tenths of a second.
_TASKS = 10_000


@dataclass(frozen=True)
class Candidate:
    """A way to cut a module.

    Attributes:
        stages_per_device: How many stages lie on each device.
        starts: The layers at which the second and later stages begin.
        seconds: Simulated time of forward and backward of a batch.
    """

    stages_per_device: int
    starts: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Chosen:
    """The candidate taken, and all of them, with the fewest stages first."""

    best: Candidate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class StagePlanner:
    """Compares cuts by the simulated time of a step.

    Args:
        devices: How many there are.
        numbers: Of stages per device, to be compared.
        least: Of how many multiplications gradients of weights come later; `None`: of none.
        checkpoint: Which micro-batches are computed again in backward.
        hand_over: Measures the seconds, forward and backward, that it takes to hand a micro-batch
            of so many bytes on to another stage.
        share: Returns what all processes are to take of what each has chosen.
    """

    devices: int
    numbers: Sequence[int]
    hand_over: Callable[[float], float]
    least: int | None = None
    checkpoint: Literal["never", "except_last", "always"] = "never"
    share: Callable[[Chosen], Chosen] = lambda chosen: chosen

    def chosen(
        self,
        called: ModuleCall,
        costs: Mapping[str, Cost],
        chunks: int,
        price: Callable[[str], float] | None,
    ) -> Chosen | None:
        """Choose from measured costs.

        Args:
            called: What was observed.
            costs: Of each layer, for a micro-batch.
            chunks: Micro-batches.
            price: What stages are to have about as much of; `None`: whatever is quickest.

        Returns:
            The choice; `None` if there are too few layers for any.
        """
        sizes = [cost.received for cost in costs.values() if cost.received]
        hand_over = self.hand_over(median(sizes) if sizes else 0.0)
        found = (self._cut(called, costs, chunks, price, n, hand_over) for n in self.numbers)
        candidates = tuple(candidate for candidate in found if candidate is not None)
        if not candidates:
            return None
        quickest = min(candidate.seconds for candidate in candidates)
        best = next(c for c in candidates if c.seconds <= (1 + _MARGIN) * quickest)
        return self.share(Chosen(best, candidates))

    def _cut(
        self,
        called: ModuleCall,
        costs: Mapping[str, Cost],
        chunks: int,
        price: Callable[[str], float] | None,
        number: int,
        hand_over: float,
    ) -> Candidate | None:
        """The best cut into a number of stages per device; `None` if there are too few layers."""

        def seconds_of(name: str) -> float:
            return costs[name].seconds

        found = choice.choose(called, number * self.devices, price or seconds_of)
        if found is None:
            return None
        layers, counts = found
        names = layers.names()
        row = [costs[name] for name in names]

        def seconds(bounds: Sequence[int]) -> float:
            return self._seconds(row, bounds, chunks, hand_over)

        bounds = [0, *accumulate(counts)]
        if price is None:
            bounds = _quickest(bounds, seconds, _TASKS // (len(counts) * chunks))
        starts = tuple(names[first] for first in bounds[1:-1])
        return Candidate(number, starts, seconds(bounds))

    def _seconds(
        self, row: Sequence[Cost], bounds: Sequence[int], chunks: int, hand_over: float
    ) -> float:
        """Simulated time of a batch."""
        stages = [sum(row[a:b], Cost()) for a, b in pairwise(bounds)]
        again = {"never": 0, "except_last": chunks - 1, "always": chunks}[self.checkpoint]
        forward, backward, weights = [], [], []
        for number, cost in enumerate(stages):
            handing = hand_over / 2 if number else 0.0
            of_inputs = cost.seconds - cost.forward - cost.weights + handing
            forward.append([cost.forward + handing] * chunks)
            backward.append(
                [of_inputs + (cost.forward if chunk < again else 0.0) for chunk in range(chunks)]
            )
            weights.append([cost.weights] * chunks)
        # What the way takes is part of what the receiver does.
        links = {Link(*pair): [0.0] * chunks for pair in pairwise(range(len(stages)))}
        return simulate.passage(Load(forward, backward, links, weights), self.devices).seconds


def _quickest(
    bounds: list[int], seconds: Callable[[Sequence[int]], float], tries: int
) -> list[int]:
    """Find the bounds of stages with which a step is quickest.

    Args:
        bounds: Those to start with; the first and the last are fixed.
        seconds: What a step takes.
        tries: About how many others may be tried: all, or else those that are better and better.
    """
    inner = range(1, len(bounds) - 1)
    if comb(bounds[-1] - 1, len(inner)) <= tries:
        every = combinations(range(1, bounds[-1]), len(inner))
        return min([bounds, *([0, *cuts, bounds[-1]] for cuts in every)], key=seconds)
    best, moved = seconds(bounds), True
    while moved and tries > 0:
        moved = False
        # One bound a layer further, or both of a stage.
        for which in (*((index,) for index in inner), *pairwise(inner)):
            for step in (-1, 1):
                tried = [b + step * (index in which) for index, b in enumerate(bounds)]
                if all(a < b for a, b in pairwise(tried)):
                    found, tries = seconds(tried), tries - 1
                    if found < best * (1 - 1e-6):
                        bounds, best, moved = tried, found, True
    return bounds
