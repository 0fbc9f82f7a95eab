"""One micro-batch on its way through the stages.

It runs the module's own `forward` in a thread of its own::

    forward of micro-batch 2:   glue | unit | unit | glue | unit ...
    holds the turn of:          ---- stage 0 ----- | ---- stage 1 ----
    its graph:                  ---- segment 0 --- x ---- segment 1 --
                                                   ^ hand-over: leaves stand for what has been made

A unit is a submodule that belongs to a stage. When one of another stage is called, the micro-batch
gives up its turn, waits for that of the other stage, and goes on there. Whatever tensors come along
are cut off from the graph, and leaves stand for them, on the stage's device: where units are
called, and where the code between units (`glue`) uses them. So each segment has a backward of its
own.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_container, parts, rebuild
from lightning_mgpu.engine.context import make_current
from lightning_mgpu.engine.pipelining import position, values
from lightning_mgpu.engine.pipelining.glue import Glue
from lightning_mgpu.engine.pipelining.segments import Crossing, Segment, Stay

__all__: list[str] = []


class _StandIn(NamedTuple):
    """What stands for a tensor of an earlier segment.

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
        return not self.tensor.is_inference() and self.tensor._version != self.version


class Traveller:
    """A micro-batch's state while it is computed.

    Args:
        chunk: Its number.
        devices: The device of each stage.
        enter: Waits for the turn of a stage.
        entered: Called when it has it.
        leave: Gives it up.
        borrow: Finds what stands for a parameter's leaf in a stage.
    """

    def __init__(
        self,
        chunk: int,
        devices: Sequence[torch.device],
        enter: "Callable[[Traveller, int], None]",
        entered: "Callable[[Traveller], None]",
        leave: "Callable[[Traveller], None]",
        borrow: Callable[[Tensor, int], Tensor | None],
    ) -> None:
        self.chunk, self._devices = chunk, list(devices)
        self._enter, self._entered, self._leave = enter, entered, leave
        self._borrow = borrow
        self._all_devices = set(devices)
        self._has_several_devices = len(self._all_devices) > 1
        self.stage: int | None = None
        self.unit: str | None = None
        """The unit that is being computed, if any."""
        self.stays: list[Stay] = []
        self._segments: list[Any] = []
        self._starts: list[int] = []
        self._inside: list[tuple[int, str]] = []
        self.recomputing: list[Any] = []
        """Of each unit that is being computed, what keeps its inputs, if anything."""
        self._here: dict[int, _StandIn] = {}
        self._last: dict[int, _StandIn] = {}
        self._rebased: list[Tensor] = []
        self._glue = Glue(self._fit, self._fit_written)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within, the calling thread computes this micro-batch."""
        _local.traveller = self
        try:
            with self._glue:
                try:
                    yield
                finally:
                    self._glue.resume_all()  # what has been cancelled within a unit
        finally:
            _local.traveller = None
            self.rest()
            self._here.clear()

    def settle(self) -> None:
        """Forget what only forward needs."""
        self._last.clear()
        self._rebased.clear()
        # Else activations would wait for the garbage collector.
        del self._enter, self._entered, self._leave, self._borrow, self._glue

    def forget(self) -> None:
        """Keep nothing for a backward."""
        self.stays, self._segments, self._starts = [], [], []
        self._last.clear()

    @property
    def device(self) -> torch.device:
        """That of the stage at hand."""
        assert self.stage is not None
        return self._devices[self.stage]

    def go(self, stage: int) -> None:
        """Hand over to a stage, unless that is where it is."""
        if stage == self.stage:
            return
        self.rest()
        self._enter(self, stage)
        self.stage = stage
        self.stays.append(Stay(stage))
        self._entered(self)
        make_current(self.device)
        self.begin_segment()

    def rest(self) -> None:
        """Give up the stage it is at."""
        if self.stage is not None:
            self._leave(self)
            self.stage = None

    def begin_segment(self, segment: Any = None) -> None:
        """Begin a piece of the graph at the stage at hand.

        Args:
            segment: The piece, if it is a special one.
        """
        assert self.stage is not None
        start = position.now()
        self.add(Segment(self.stage, start) if segment is None else segment, start)

    def add(self, segment: Any, start: int) -> None:
        """Have a piece of the graph begin at a position."""
        self._segments.append(segment)
        self._starts.append(start)
        self.stays[-1].segments.append(segment)
        self._here.clear()

    def enter_unit(self, name: str, stage: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A submodule is about to be computed; returns its arguments as its stage may have them."""
        self._inside.append((stage, name))
        self._glue.pause()
        self.unit = name
        self.go(stage)
        return self.bring(args), self.bring(kwargs)

    def abandon_unit(self) -> None:
        """It has failed."""
        self._inside.pop()
        self._glue.resume()

    def leave_unit(self, output: Any) -> Any:
        """It has been computed; returns its output, for whoever has called it."""
        self._inside.pop()
        self._glue.resume()
        self.unit = None
        if self._inside:
            stage, self.unit = self._inside[-1]
            if stage != self.stage:
                self.go(stage)
                output = self.bring(output)
        return output

    def bring(self, value: Any) -> Any:
        """A value whose tensors are those of the segment at hand; lists and dicts stay the same."""
        if isinstance(value, Tensor):
            return self._fit(value)
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
            changed = any(new is not old for new, old in zip(made, value, strict=True))
            return tuple(made) if changed else value
        if is_container(value):
            old = [part for _, part in parts(value)]
            made = [self.bring(part) for part in old]
            changed = any(new is not part for new, part in zip(made, old, strict=True))
            return rebuild(value, made) if changed else value
        return value

    def latest(self, tensor: Tensor) -> Tensor:
        """A tensor, or what stands for it and has been written to instead."""
        last = self._last.get(id(tensor))
        while last is not None and last.is_written:
            tensor = last.tensor
            last = self._last.get(id(tensor))
        return tensor

    def segment_of(self, tensor: Tensor) -> Any:
        """Where a tensor was made that has a graph."""
        made = position.of(tensor)
        assert made is not None
        return self._segments[bisect_right(self._starts, made) - 1]

    def was_copied_and_written(self, tensor: Tensor) -> bool:
        """Whether something has been written to a copy of it on another device."""
        last = self._last.get(id(tensor))
        return last is not None and last.is_written and last.tensor.device != tensor.device

    def _fit(self, tensor: Tensor) -> Tensor:
        if not self._last and not self._rebased and not self._is_foreign(tensor):
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
            version = -1 if made.is_inference() else made._version
            self._here[key] = _StandIn(tensor, made, version)
            # (The tensor itself may have been replaced by the source before.)
            self._last[id(source)] = _StandIn(source, made, version)
        return made

    def _is_foreign(self, tensor: Tensor) -> bool:
        """Whether it may be another stage's or an earlier segment's."""
        if self._has_several_devices and tensor.device != self.device:
            return True
        if not tensor.requires_grad:
            return False
        made = position.of(tensor)
        return made is None or made < self._starts[-1]

    def _made_for(self, source: Tensor) -> Tensor:
        """What stands for a tensor in the segment at hand; the same if it may be used itself."""
        is_foreign = self._is_foreign(source)
        if is_foreign or source._is_view():
            self._check_memory(source)
        if not is_foreign:
            return source
        device = self.device
        is_elsewhere = source.device != device and source.device in self._all_devices
        if source.requires_grad:
            made_at = position.of(source)
            if made_at is None:
                borrowed = self._borrow(source, self.stage or 0)
                if borrowed is not None:
                    return borrowed
            elif made_at < self._starts[-1] and torch.is_grad_enabled():
                return self._cut(source, made_at, device if is_elsewhere else source.device)
        return source.to(device, non_blocking=True) if is_elsewhere else source

    def _check_memory(self, tensor: Tensor) -> None:
        """Refuse a tensor whose memory has been written to by another, of another segment.

        On one device, autograd would know of it: they are views of each other. (It makes the node
        of such a view anew, so that it seems to be one of the segment at hand.)
        """
        written = [stand_in for stand_in in self._last.values() if stand_in.is_written]
        if not written and not self._rebased:
            return
        replaced = {id(stand_in.original): stand_in.tensor for stand_in in written}
        pairs = [(stand_in.original, stand_in.tensor) for stand_in in written]
        memory = _memory(tensor)
        base = tensor._base if tensor._is_view() else None
        for original, latest in [*pairs, *((own, own) for own in self._rebased)]:
            while id(latest) in replaced:
                latest = replaced[id(latest)]
            if memory not in (_memory(original), _memory(latest)) or latest is tensor:
                continue
            if base is not None and any(base is own for own in (latest, latest._base)):
                continue
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} shares memory with another that has been"
                " written to in place since, on another stage of the pipeline. Write to a copy"
                " (`x = x.clone()`, `inplace=False`)."
            )

    def _cut(self, source: Tensor, made_at: int, device: torch.device) -> Tensor:
        leaf = source.detach().to(device, non_blocking=True).requires_grad_()
        if made_at >= self._starts[0]:
            segment = self._segments[bisect_right(self._starts, made_at) - 1]
            segment.leaving.append(Crossing(source, leaf))
        return values.enter(leaf)

    def _fit_written(self, tensor: Tensor) -> Tensor:
        """A tensor that is about to be written to, as one of the segment at hand."""
        made_at = position.of(tensor) if tensor.requires_grad else None
        last = self._last.get(id(tensor))
        if last is not None:
            return self._fit(tensor)
        if made_at is None or made_at >= self._starts[-1] or not torch.is_grad_enabled():
            return tensor
        if tensor.device != self.device or tensor._is_view():
            raise RuntimeError(
                "The code between layers writes in place to a tensor of shape"
                f" {tuple(tensor.shape)} that another stage of the pipeline has made. Write to a"
                " copy of it (`x = x.clone()`)."
            )
        return self._rebase(tensor, made_at)

    def _rebase(self, tensor: Tensor, made_at: int) -> Tensor:
        """Make a tensor of an earlier segment one of this segment, the object that it is."""
        source = values.enter(tensor)  # (no view, which would follow the tensor)
        position_of_source = bisect_right(self._starts, made_at) - 1
        tensor.detach_()
        leaf = tensor.detach().requires_grad_()
        self._segments[position_of_source].leaving.append(Crossing(source, leaf))
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


def current() -> Traveller | None:
    """The micro-batch that the calling thread computes."""
    return getattr(_local, "traveller", None)


_local = threading.local()
