"""Predict the memory of devices, and choose the stages that are computed again to save some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost
from lightning_mgpu.engine.pipeline.runtime.checkpointing import (
    CHECKPOINTS,
    Checkpoint,
    computed_again,
)

# The output, what a loss keeps of it, and the gradients of both.
_OF_OUTPUT = 4.0


class Weight(NamedTuple):
    """Bytes of a parameter or buffer.

    Attributes:
        size: Of itself.
        whole: With its gradient and what the optimizer keeps.
    """

    size: int
    whole: int


class DeviceMemory(NamedTuple):
    """Peak bytes of a device.

    Attributes:
        weights: Of parameters, buffers, gradients and what the optimizer keeps.
        activations: Of what is kept for backward, what is computed again at a time, and the output.
    """

    weights: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.activations


@dataclass(frozen=True)
class MemoryLimit:
    """Memory of each device.

    Attributes:
        size: Its bytes.
        weights_of: Returns a submodule's parameters and buffers, each by what identifies it.
        others: Bytes that the first device has to hold beside what layers have.
    """

    size: float
    weights_of: Callable[[str], Mapping[int, Weight]]
    others: float = 0.0


class StagesInMemory(NamedTuple):
    """Which micro-batches of each stage are computed again, and the memory of each device."""

    checkpoint: tuple[Checkpoint, ...]
    devices: tuple[DeviceMemory, ...]


@dataclass(frozen=True)
class _Stage:
    """What a stage keeps, in bytes, and the seconds of forward for one micro-batch."""

    whole: float
    inputs: float
    largest: float
    seconds: float

    def kept(self, checkpoint: Checkpoint, chunks: int) -> float:
        again = computed_again(checkpoint, chunks)
        return again * self.inputs + (chunks - again) * self.whole


class MemoryModel:
    """Memory of devices for any cut of a row of layers.

    Devices hold all micro-batches until their backward: what autograd keeps of them, or only the
    inputs of layers, of which one at a time is computed again, from a copy of its inputs.

    Args:
        limit: What devices have.
        costs: Of each layer for a micro-batch, by name; the module itself has no name.
        names: The layers, in order.
        devices: How many devices there are.
        chunks: Micro-batches.
    """

    def __init__(
        self,
        limit: MemoryLimit,
        costs: Mapping[str, Cost],
        names: Sequence[str],
        devices: int,
        chunks: int,
    ) -> None:
        self._limit, self._devices, self._chunks = limit, devices, chunks
        self._row = [costs[name] for name in names]
        self._weights = [limit.weights_of(name) for name in names]
        inside = {key for weights in self._weights for key in weights}
        # The first device has all that is in no layer, and what the caller does with the output.
        self._outputs = _OF_OUTPUT * chunks * costs[""].returned
        whole = limit.weights_of("")
        self._others = limit.others + sum(w.whole for key, w in whole.items() if key not in inside)

    def fitted(self, bounds: Sequence[int], least: Sequence[Checkpoint]) -> StagesInMemory:
        """Find what has to be computed again, as little as possible.

        Args:
            bounds: Of the stages: the first layer of each, and the number of all.
            least: Of each stage, what is computed again anyway.

        Returns:
            What fits, or takes least memory if nothing does.
        """
        weights = self._weights_of(bounds)
        stages = [self._stage(self._row[a:b]) for a, b in pairwise(bounds)]
        checkpoint = list(least)
        found = []
        for device in range(self._devices):
            own = range(device, len(stages), self._devices)
            extra = self._outputs if device == 0 else 0.0
            levels = [CHECKPOINTS[CHECKPOINTS.index(least[stage]) :] for stage in own]
            room = self._limit.size - weights[device]
            chosen, kept = self._chosen([stages[s] for s in own], levels, room - extra)
            for stage, of_stage in zip(own, chosen, strict=True):
                checkpoint[stage] = of_stage
            found.append(DeviceMemory(weights[device], kept + extra))
        return StagesInMemory(tuple(checkpoint), tuple(found))

    def excess(self, devices: Sequence[DeviceMemory]) -> float:
        """Bytes that the fullest device has too few of, as a share of what it has."""
        return max(0.0, max(device.total for device in devices) / self._limit.size - 1)

    def _chosen(
        self, stages: Sequence[_Stage], levels: Sequence[Sequence[Checkpoint]], room: float
    ) -> tuple[Sequence[Checkpoint], float]:
        """What is computed again of a device's stages, and the bytes that are kept then."""
        ways = []
        for way in product(*levels):
            again = [computed_again(of_stage, self._chunks) for of_stage in way]
            at_once = max(
                (stage.largest for stage, n in zip(stages, again, strict=True) if n), default=0.0
            )
            kept = sum(s.kept(c, self._chunks) for s, c in zip(stages, way, strict=True))
            seconds = sum(s.seconds * n for s, n in zip(stages, again, strict=True))
            ways.append((kept + at_once, seconds, way))
        fitting = [way for way in ways if way[0] <= room]
        if fitting:
            kept, _, best = min(fitting, key=lambda way: (way[1], way[0]))
        else:
            kept, _, best = min(ways, key=lambda way: (way[0], way[1]))
        return best, kept

    def _stage(self, row: Sequence[Cost]) -> _Stage:
        inputs = {number: size for cost in row for number, size in cost.inputs.items()}
        return _Stage(
            sum(cost.activations for cost in row),
            sum(inputs.values()),
            max(cost.activations + cost.received for cost in row),
            sum(cost.forward for cost in row),
        )

    def _weights_of(self, bounds: Sequence[int]) -> list[float]:
        """Bytes of each device's weights; the first stage that uses a parameter has it."""
        taken = [0.0] * self._devices
        taken[0] += self._others
        holders: dict[int, set[int]] = {}
        for stage, (first, end) in enumerate(pairwise(bounds)):
            device = stage % self._devices
            for weights in self._weights[first:end]:
                for key, weight in weights.items():
                    holding = holders.setdefault(key, set())
                    if not holding:
                        taken[device] += weight.whole
                    elif device not in holding:
                        taken[device] += 2 * weight.size  # a copy, with a gradient for the owner
                    holding.add(device)
        return taken
