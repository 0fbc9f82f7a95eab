"""Run a module's `forward` on a few samples in the calling thread."""

from collections.abc import Callable, Mapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch.containers import holds_tensors
from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.inputs import entries
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitting
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller
from lightning_mgpu.engine.pipeline.runtime.units import Units


class SampleRun:
    """Run a call on some of its samples.

    Args:
        forward: What is called.
        call: With what.
        splitting: How its arguments are split.
        devices: The device of each stage.
        units: What belongs to stages, once that is known.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        call: CallArguments,
        splitting: Splitting,
        devices: Sequence[torch.device],
        units: Units | None = None,
    ) -> None:
        self._forward, self._call, self._splitting = forward, call, splitting
        self._devices, self._units = devices, units
        self.written: set[str] = set()
        """Names of lists and batches of graphs that `forward` has put something into."""

    def run(self, start: int, stop: int) -> Any:
        """Return the output for samples `start` to `stop`."""
        split, objects = self._splitting, self._call.copied_objects()
        inputs = {n: self._samples(n, t, start, stop) for n, t in self._call.tensors.items()}
        taken = {n: self._piece(n, p, start, stop) for n, p in self._call.pieces.items()}
        before = {name: entries.held_by(piece) for name, piece in taken.items()}
        args, kwargs = self._call.filled({**inputs, **taken}, objects)
        output = self._output(args, kwargs)
        for name in split.pieces:
            held = entries.held_by(taken[name])
            if len(held) != len(before[name]) or any(map(is_not, held, before[name])):
                self.written.add(name)
        if split.dims or split.pieces:
            self._check_untouched(objects)
        return output

    def _check_untouched(self, copies: Mapping[int, Any]) -> None:
        for name, value in self._call.stateful().items():
            if id(value) in copies and holds_tensors(copies[id(value)]) > holds_tensors(value):
                raise SplitError(
                    f"`forward` writes to its argument `{name}`, a `{type(value).__name__}`, which"
                    " all micro-batches would share. Make it within `forward`, and return it."
                )

    def _output(self, args: Any, kwargs: Any) -> Any:
        if self._units is None or len(set(self._devices)) == 1:
            return self._forward(*args, **kwargs)
        traveller = Traveller(0, self._devices, _pass, _pass, _pass, _pass)
        with self._units.attached(), traveller.entered():
            traveller.go(0)
            return self._forward(*args, **kwargs)

    def _piece(self, name: str, piece: Any, start: int, stop: int) -> Any:
        """A copy, where there can be one."""
        is_split = name in self._splitting.pieces
        return entries.copied(entries.take(piece, start, stop) if is_split else piece)

    def _samples(self, name: str, tensor: Tensor, start: int, stop: int) -> Any:
        """A copy, which may be written to."""
        dim = self._splitting.dims.get(name)
        part = tensor.detach() if dim is None else tensor.detach().narrow(dim, start, stop - start)
        part = part.clone()
        if tensor.requires_grad and torch.is_grad_enabled():
            part.requires_grad_()
        return stage_values.enter(part)


def _pass(*_: Any) -> None:
    """Do nothing: no other thread takes turns."""
