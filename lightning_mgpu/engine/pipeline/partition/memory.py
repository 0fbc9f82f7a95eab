"""Predict the memory of devices, and choose the stages that are computed again to save some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.checkpointing import (
    CHECKPOINTS,
    Checkpoint,
    computed_again,
)

# How often the caller has the module's output when backward begins: itself, what a loss keeps, and
# the gradient; and when the loss is through.
_EARLY, _LATE = 3.0, 2.0


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
    at_once: float
    seconds: float


class _Way(NamedTuple):
    """What is computed again of a device's stages, and what that costs."""

    seconds: float
    kept: float
    checkpoint: tuple[Checkpoint, ...]


class MemoryModel:
    """Memory of devices for any cut of a row of layers.

    Devices hold all micro-batches until their backward: what autograd keeps of them, or only the
    inputs of layers, of which one at a time is computed again, from a copy of its inputs, and with
    the gradient of its output.

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
        self._output = float(chunks * costs[""].returned)
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
        stages = [self._stage(self._row[a:b], first=a == 0) for a, b in pairwise(bounds)]
        checkpoint = list(least)
        found = []
        for device in range(self._devices):
            own = range(device, len(stages), self._devices)
            levels = [CHECKPOINTS[CHECKPOINTS.index(least[stage]) :] for stage in own]
            output = self._output if device == 0 else 0.0
            ways = [self._way([stages[s] for s in own], way, output) for way in product(*levels)]
            fitting = [way for way in ways if weights[device] + way.kept <= self._limit.size]
            best = min(fitting) if fitting else min(ways, key=lambda way: way.kept)
            for stage, of_stage in zip(own, best.checkpoint, strict=True):
                checkpoint[stage] = of_stage
            found.append(DeviceMemory(weights[device], best.kept))
        return StagesInMemory(tuple(checkpoint), tuple(found))

    def excess(self, devices: Sequence[DeviceMemory]) -> float:
        """Bytes that the fullest device has too few of, as a share of what it has."""
        return max(0.0, max(device.total for device in devices) / self._limit.size - 1)

    def _way(
        self, stages: Sequence[_Stage], checkpoint: tuple[Checkpoint, ...], output: float
    ) -> _Way:
        """What it takes to compute so much of a device's stages again."""
        kept = last = at_once = seconds = 0.0
        for stage, of_stage in zip(stages, checkpoint, strict=True):
            again = computed_again(of_stage, self._chunks)
            kept += again * stage.inputs
            seconds += again * stage.seconds
            if not again:
                kept += self._chunks * stage.whole
            else:
                # The last micro-batch's backward is over before others are computed again.
                last += (self._chunks - again) * stage.whole
                at_once = max(at_once, stage.at_once)
        return _Way(
            seconds, kept + max(last + _EARLY * output, at_once + _LATE * output), checkpoint
        )

    def _stage(self, row: Sequence[Cost], first: bool) -> _Stage:
        inputs = {number: size for cost in row for number, size in cost.inputs.items()}
        # What waits for gradients of weights: of the visit that is at work, and of those before.
        visits = 1 if first else 1 + schedule.DEFERRED_RECOMPUTED_VISITS
        held = sum(cost.held for cost in row)
        return _Stage(
            sum(cost.activations for cost in row),
            sum(inputs.values()),
            max(c.activations + c.received + c.returned for c in row) + visits * held,
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
