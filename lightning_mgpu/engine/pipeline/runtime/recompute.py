"""Activation checkpointing: run a unit without a graph, and again with one in backward."""

from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch import version_of
from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.runtime.recurrent_state import Memory
from lightning_mgpu.engine.pipeline.runtime.segments import Crossing, Timed
from lightning_mgpu.engine.pipeline.runtime.split_backward import SplitBackward
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller
from lightning_mgpu.engine.randomness import Stream

_UNCHANGING = (
    *(Tensor, bool, int, float, complex, str, bytes, type(None), Enum),
    *(torch.dtype, torch.device, torch.Size, slice, range),
)


class Recomputed:
    """A checkpointed call of a unit, as a segment of its own.

    Args:
        module: The unit.
        memory: What it remembers from call to call.
        stream: Where it draws from.
    """

    def __init__(self, module: nn.Module, memory: Memory, stream: Stream) -> None:
        self._module, self._memory, self._stream = module, memory, stream
        self._crossings: list[Crossing] = []
        self._promised: list[Tensor] = []

    def begin(self, traveller: Traveller, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Keep the unit's arguments; return the arguments to call it with."""
        self._device, self._deferred = traveller.device, traveller.deferred
        self._context = ThreadContext.capture()
        self._numbers = self._stream.state(self._device)
        self._before = self._memory.before()
        self._copies: list[Tensor] = []
        self._kept = stage_values.map_tensors(lambda t: self._keep(t, traveller), (args, kwargs))
        traveller.begin_segment(self)
        copies = iter(self._copies)
        called: tuple[Any, Any] = stage_values.map_tensors(
            lambda t: t if isinstance(t, nn.Parameter) else next(copies), (args, kwargs)
        )
        self._called, self._length = called, _length(called)
        torch.set_grad_enabled(False)
        return called

    def abandon(self) -> None:
        """Clean up after the unit has failed."""
        torch.set_grad_enabled(True)

    def end(self, traveller: Traveller, output: Any) -> Any:
        """Return the unit's output as the start of a new segment."""
        torch.set_grad_enabled(True)
        if _length(self._called) != self._length:
            raise RuntimeError(
                f"A `{type(self._module).__name__}` adds to a list or dict among its"
                " arguments, which is lost with activation checkpointing. Return what it"
                " adds, or use `checkpoint='never'`."
            )
        self._moment = self._memory.after(self._before)
        del self._before, self._called
        if any(version_of(copy) > 0 for copy in self._copies):
            raise RuntimeError(
                f"A `{type(self._module).__name__}` writes to its input, which its first call"
                " did not show, so it cannot be recomputed in backward. Work on a copy"
                " (`inplace=False`, `x.clone()`), or use `checkpoint='never'`."
            )
        del self._copies
        traveller.begin_segment()
        return stage_values.map_tensors(self._promise, output)

    def backward(self, keep: bool, timed: Timed) -> None:
        """Recompute the unit and run its backward, as `Segment.backward` does."""
        seeds = [tensor.grad for tensor in self._promised]
        for tensor in self._promised:
            tensor.grad = None
        if any(seed is not None for seed in seeds):
            self._backward(seeds, timed)
        if not keep:
            self._crossings, self._promised, self._kept = [], [], None

    def _backward(self, seeds: list[Tensor | None], timed: Timed) -> None:
        again: dict[int, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            if isinstance(tensor, nn.Parameter):
                return tensor
            return again.setdefault(id(tensor), stage_values.copy(tensor))

        inputs = stage_values.map_tensors(copied, self._kept)
        with (
            timed("recompute"),
            self._context.entered(self._device),
            self._memory.rewound(self._moment),
            self._stream.at(self._numbers, self._device),
            torch.enable_grad(),
            nullcontext() if self._deferred is None else SplitBackward(self._deferred),
        ):
            args, kwargs = stage_values.map_tensors(stage_values.enter, inputs)
            output = self._module(*args, **kwargs)
            made = [t for t in stage_values.tensors(output) if stage_values.may_have_gradient(t)]
        pairs = [
            (tensor, seed)
            for tensor, seed in zip(made, seeds, strict=True)
            if seed is not None and tensor.requires_grad
        ]
        if pairs:
            with timed("backward"):
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        for crossing in self._crossings:
            crossing.leaf.grad = again[id(crossing.leaf)].grad

    def _keep(self, tensor: Tensor, traveller: Traveller) -> Tensor:
        """Keep an argument's tensor without its graph, and note where it came from."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        leaf = tensor.detach()
        if tensor.requires_grad:
            leaf = leaf.requires_grad_()
            crossing = Crossing(tensor, leaf)
            self._crossings.append(crossing)
            traveller.graph.of(tensor).leaving.append(crossing)
        self._copies.append(tensor.detach().clone())
        return leaf

    def _promise(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        promised = stage_values.promise_gradient(tensor)
        if promised.requires_grad:
            self._promised.append(promised)
        return stage_values.enter(promised)


def is_worth_it(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return whether a unit has a graph and can be computed twice without harm.

    An object among its arguments, such as a cache, would be changed twice.
    """
    found = (leaf for _, leaf in leaves((args, kwargs)))
    if not all(isinstance(leaf, _UNCHANGING) or callable(leaf) for leaf in found):
        return False
    return any(p.requires_grad for p in module.parameters()) or any(
        tensor.requires_grad for tensor in stage_values.tensors((args, kwargs))
    )


def _length(value: Any) -> int:
    return sum(1 for _ in leaves(value))
