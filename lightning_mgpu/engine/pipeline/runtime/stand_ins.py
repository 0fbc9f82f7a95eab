"""Replacements for tensors of earlier segments in the current segment.

A tensor that another segment has made is cut off from its graph, and lies on the device of the
stage that computes next. Each has one stand-in a segment, so that `x is x` stays true, and what is
written to a stand-in is what the tensor is from then on.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import base_of, is_view, version_of
from lightning_mgpu.engine.batch.containers import is_container, parts, rebuild
from lightning_mgpu.engine.device import copied
from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.runtime import graph_position
from lightning_mgpu.engine.pipeline.runtime.segments import Crossing, Graph


class _StandIn(NamedTuple):
    """Replacement for a tensor of an earlier segment.

    Attributes:
        original: The tensor, kept alive so that its `id` is its own.
        tensor: What stands for it.
        version: How often the stand-in had been written to when it was made.
    """

    original: Tensor
    tensor: Tensor
    version: int

    @property
    def is_written(self) -> bool:
        return not self.tensor.is_inference() and version_of(self.tensor) != self.version


class StandIns:
    """Replacements for one micro-batch's tensors.

    Args:
        graph: Its segments.
        devices: The device of each stage.
        borrow: Finds what stands for a parameter's leaf in a stage.
    """

    def __init__(
        self,
        graph: Graph,
        devices: Sequence[torch.device],
        borrow: Callable[[Tensor, int], Tensor | None],
    ) -> None:
        self._graph, self._devices, self._borrow = graph, list(devices), borrow
        self._all_devices = set(devices)
        self._has_several_devices = len(self._all_devices) > 1
        self._stage = 0
        self._here: dict[int, _StandIn] = {}
        self._last: dict[int, _StandIn] = {}
        self._rebased: list[Tensor] = []

    def begin(self, stage: int) -> None:
        """Start a segment without any replacements."""
        self._stage = stage
        self._here.clear()

    def end(self) -> None:
        """Finish the last segment."""
        self._here.clear()

    def bring(self, value: Any) -> Any:
        """Replace tensors in a value by those of the current segment; containers stay the same."""
        if isinstance(value, Tensor):
            return self.fit(value)
        if type(value) is list:
            for index, part in enumerate(value):
                new = self.bring(part)
                if new is not part:
                    value[index] = new
            return value
        if type(value) is dict:
            for key, part in value.items():
                new = self.bring(part)
                if new is not part:
                    value[key] = new
            return value
        if type(value) is tuple:
            made = [self.bring(part) for part in value]
            return value if all(map(operator.is_, made, value)) else tuple(made)
        if is_container(value):
            old = [part for _, part in parts(value)]
            made = [self.bring(part) for part in old]
            return value if all(map(operator.is_, made, old)) else rebuild(value, made)
        return value

    def latest(self, tensor: Tensor) -> Tensor:
        """The tensor, or its replacement if that has been written to."""
        last = self._last.get(id(tensor))
        while last is not None and last.is_written:
            tensor = last.tensor
            last = self._last.get(id(tensor))
        return tensor

    def was_copied_and_written(self, tensor: Tensor) -> bool:
        """Return whether a copy of the tensor on another device has been written to."""
        last = self._last.get(id(tensor))
        return last is not None and last.is_written and last.tensor.device != tensor.device

    def fit(self, tensor: Tensor) -> Tensor:
        """Return a tensor for use in the current segment."""
        if self._is_plainly_own(tensor):
            return tensor
        # (What was made without a graph must not stand for it where there is one.)
        key = id(tensor) if torch.is_grad_enabled() else ~id(tensor)
        known = self._here.get(key)
        if known is not None:
            self._check_memory(known.tensor)
            return known.tensor
        source = self.latest(tensor)
        made = self._made_for(source)
        if made is not source:
            version = -1 if made.is_inference() else version_of(made)
            self._here[key] = _StandIn(tensor, made, version)
            # (The tensor itself may have been replaced by the source before.)
            self._last[id(source)] = _StandIn(source, made, version)
        return made

    def _is_plainly_own(self, tensor: Tensor) -> bool:
        """Return whether a tensor was made in the current segment, and nothing stands for it."""
        if self._rebased or id(tensor) in self._last:
            return False
        # (A view may have been made anew, of memory that has been written to.)
        return not (self._last and is_view(tensor)) and not self._is_foreign(tensor)

    def _is_foreign(self, tensor: Tensor) -> bool:
        """Return whether a tensor may belong to another stage or an earlier segment."""
        if self._has_several_devices and tensor.device != self._devices[self._stage]:
            return True
        if not tensor.requires_grad:
            return False
        made = graph_position.of(tensor)
        return made is None or made < self._graph.start

    def _made_for(self, source: Tensor) -> Tensor:
        """Replacement for a tensor in the current segment; itself if it can be used directly."""
        is_foreign = self._is_foreign(source)
        if is_foreign or is_view(source):
            self._check_memory(source)
        if not is_foreign:
            return source
        device = self._devices[self._stage]
        is_elsewhere = source.device != device and source.device in self._all_devices
        if source.requires_grad:
            made_at = graph_position.of(source)
            if made_at is None:
                borrowed = self._borrow(source, self._stage)
                if borrowed is not None:
                    return borrowed
            elif made_at < self._graph.start and torch.is_grad_enabled():
                return self._cut(source, made_at, device if is_elsewhere else source.device)
        return copied(source, device) if is_elsewhere else source

    def _check_memory(self, tensor: Tensor) -> None:
        """Refuse a tensor whose memory another segment's tensor has written to.

        On one device, autograd would know of it: they are views of each other. (It makes the node
        of such a view anew, so that it seems to be one of the segment at hand.)
        """
        written = [stand_in for stand_in in self._last.values() if stand_in.is_written]
        if not written and not self._rebased:
            return
        replaced = {id(stand_in.original): stand_in.tensor for stand_in in written}
        pairs = [(stand_in.original, stand_in.tensor) for stand_in in written]
        memory = _memory(tensor)
        base = base_of(tensor) if is_view(tensor) else None
        for original, latest in [*pairs, *((own, own) for own in self._rebased)]:
            while id(latest) in replaced:
                latest = replaced[id(latest)]
            if memory not in (_memory(original), _memory(latest)) or latest is tensor:
                continue
            if base is not None and any(base is own for own in (latest, base_of(latest))):
                continue
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} shares memory with another that was"
                " written to in place afterwards, on another stage of the pipeline. Write to"
                " a copy (`x = x.clone()`, `inplace=False`)."
            )

    def _cut(self, source: Tensor, made_at: int, device: torch.device) -> Tensor:
        leaf = copied(source.detach(), device).requires_grad_()
        segment = self._graph.at(made_at)
        if segment is not None:
            segment.leaving.append(Crossing(source, leaf))
        return stage_values.enter(leaf)

    def fit_written(self, tensor: Tensor) -> Tensor:
        """Return a tensor for in-place writes in the current segment."""
        made_at = graph_position.of(tensor) if tensor.requires_grad else None
        last = self._last.get(id(tensor))
        if last is not None:
            return self.fit(tensor)
        if made_at is None or made_at >= self._graph.start or not torch.is_grad_enabled():
            return tensor
        if tensor.device != self._devices[self._stage] or is_view(tensor):
            raise RuntimeError(
                "The code between layers writes in place to a tensor of shape"
                f" {tuple(tensor.shape)} that another stage of the pipeline has made. Write to"
                " a copy of it (`x = x.clone()`)."
            )
        return self._rebase(tensor, made_at)

    def _rebase(self, tensor: Tensor, made_at: int) -> Tensor:
        """Move a tensor of an earlier segment into this one, keeping its identity."""
        source = stage_values.enter(tensor)  # (no view, which would follow the tensor)
        tensor.detach_()
        leaf = tensor.detach().requires_grad_()
        self._graph.at(made_at).leaving.append(Crossing(source, leaf))
        self._rebased.append(tensor)
        rebased: Tensor = _Rebase.apply(leaf, tensor)  # type: ignore[no-untyped-call]
        return rebased


class _Rebase(torch.autograd.Function):
    """Gives a tensor the graph of a leaf that has its value."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
