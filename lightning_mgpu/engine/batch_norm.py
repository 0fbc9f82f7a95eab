"""Running statistics of a batch whose parts are normalised separately.

Each part (a replica's shard, a pipeline's micro-batch) is normalised with its own mean and
variance, but the running statistics are updated once, with those of the whole batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import BatchNorm, attach, buffers_of, detach
from lightning_mgpu.engine.worker_thread import slot_here

Statistics = Literal["merge", "first"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_HOOK = "lightning_mgpu.batch_norm"


@dataclass
class _BatchStatistics:
    """Batch statistics of one call of a layer: per channel, in the running statistics' dtype."""

    count: float
    mean: Tensor
    variance: Tensor
    """Unbiased variance per channel."""
    part: int = 0


@dataclass
class _Layer:
    """The calls of one layer in one part, and what the layer holds otherwise."""

    calls: list[_BatchStatistics] = field(default_factory=list)
    outside: tuple[dict[str, Tensor | None], float | None] | None = None


class Recorder:
    """Keeps the batch statistics of some layers, whose running statistics stay as they are.

    Args:
        layers: Layers of one part; those in training mode are recorded.
        part: If the layers are those of several parts, which take turns: tells which is computed.
    """

    def __init__(self, layers: Sequence[nn.Module], part: Callable[[], int] | None = None) -> None:
        self.layers = list(layers)
        self._part = part
        self._state = {id(layer): _Layer() for layer in layers}
        self._slot: int | None = None

    def attach(self) -> None:
        """Hook into the layers, for the slot that first calls one."""
        self._slot = None
        for layer in self.layers:
            attach(layer, _HOOK, self._before, self._after)

    def detach(self) -> None:
        """Leave the layers as they were before, also after an exception within one."""
        for layer in self.layers:
            detach(layer, _HOOK)
            self._restore(layer)

    def take(self) -> list[list[_BatchStatistics]]:
        """The calls of each layer since the last time."""
        taken = [self._state[id(layer)].calls for layer in self.layers]
        self._state = {id(layer): _Layer() for layer in self.layers}
        return taken

    def take_parts(self, count: int) -> list[list[list[_BatchStatistics]]]:
        """The calls of each layer since the last time, for each part."""
        taken = self.take()
        return [[[c for c in calls if c.part == i] for calls in taken] for i in range(count)]

    def _before(self, layer: Any, _: Any) -> None:
        if not layer.training or layer.running_mean is None:
            return
        here = slot_here()
        if self._slot is None:
            self._slot = here
        if here not in (None, self._slot) and self._part is None:
            raise RuntimeError(
                f"A `{type(layer).__name__}` of one replica is called in the step of another, by a"
                " reference that was not found when the model was copied. Keep modules in plain"
                " attributes, lists and dicts of the model, and reach them through `self`."
            )
        held = buffers_of(layer)
        buffers = {name: held[name] for name in _STATISTICS}
        self._state[id(layer)].outside = (buffers, layer.momentum)
        # From nothing and with a momentum of 1, the running statistics are the batch's.
        layer.momentum = 1.0
        held.update(
            {name: None if b is None else torch.zeros_like(b) for name, b in buffers.items()}
        )

    def _after(self, layer: Any, inputs: Any, _: Any) -> None:
        state = self._state[id(layer)]
        if state.outside is None:
            return
        mean, variance = layer.running_mean, layer.running_var
        self._restore(layer)
        part = self._part() if self._part is not None else 0
        state.calls.append(_BatchStatistics(inputs[0].numel() / mean.numel(), mean, variance, part))

    def _restore(self, layer: Any) -> None:
        state = self._state[id(layer)]
        if state.outside is not None:
            buffers, layer.momentum = state.outside
            buffers_of(layer).update(buffers)
            state.outside = None


@contextmanager
def aside(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which running statistics are not updated by layers in training mode.

    So in backward, where those who compute again have been counted before.
    """
    training = [layer for layer in layers_of(layers) if layer.training]
    kept = [{name: buffers_of(layer)[name] for name in _STATISTICS} for layer in training]
    for layer, buffers in zip(training, kept, strict=True):
        buffers_of(layer).update(
            {name: None if b is None else torch.zeros_like(b) for name, b in buffers.items()}
        )
    try:
        yield
    finally:
        for layer, buffers in zip(training, kept, strict=True):
            buffers_of(layer).update(buffers)


def layers_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers that keep running statistics."""
    return [m for m in modules if isinstance(m, BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def commit(layers: Sequence[nn.Module], parts: Sequence[list[list[_BatchStatistics]]]) -> None:
    """Update running statistics as if each layer had seen the parts as one batch.

    Args:
        layers: The layers to update.
        parts: For each part, the calls of each layer as `Recorder.take` returns them.
    """
    for index, layer in enumerate(layers):
        calls = [part[index] for part in parts]
        for number in range(max(map(len, calls), default=0)):
            _update(layer, [call[number] for call in calls if number < len(call)])


def _update(layer: Any, calls: Sequence[_BatchStatistics]) -> None:
    """Chan, Golub and LeVeque's pooling of variances, then torch's moving average."""
    device = layer.running_mean.device
    means = [call.mean.to(device) for call in calls]
    total = sum(call.count for call in calls)
    mean = torch.zeros_like(means[0])
    for part, call in zip(means, calls, strict=True):
        mean += part * (call.count / total)
    squares = torch.zeros_like(mean)
    for part, call in zip(means, calls, strict=True):
        squares += call.variance.to(device) * (call.count - 1) + (part - mean) ** 2 * call.count
    tracked = layer.num_batches_tracked
    if tracked is not None:
        tracked += 1
    momentum = layer.momentum if layer.momentum is not None else 1.0 / float(tracked)
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(squares / max(total - 1, 1), momentum)
