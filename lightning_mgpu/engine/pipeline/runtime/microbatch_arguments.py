"""Arguments of each micro-batch."""

from collections.abc import Callable, Collection, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import version_of
from lightning_mgpu.engine.pipeline import microbatch, stage_values
from lightning_mgpu.engine.pipeline.inputs import entries as pieces
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitting
from lightning_mgpu.engine.pipeline.runtime.traveller import current


class MicrobatchArguments:
    """Arguments of a call, split into micro-batches.

    Args:
        call: The call.
        splitting: How they are split.
        counts: Samples in each micro-batch.
    """

    def __init__(self, call: CallArguments, splitting: Splitting, counts: Sequence[int]) -> None:
        self._call, self._dims, self._counts = call, splitting.dims, counts
        self._chunks = microbatch.cut(call.tensors, splitting.dims, counts)
        self._pieces = self._dealt(splitting.pieces)
        self._wanting = [n for n, t in call.tensors.items() if t.requires_grad]
        self._leaves: list[dict[str, Tensor]] = [{} for _ in counts]
        self._first: dict[int, Tensor] = {}
        self._handed: list[Tensor] = []

    def compute(self, forward: Callable[..., Any], chunk: int) -> Any:
        """Call a function with a micro-batch's arguments.

        Raises:
            RuntimeError: It writes to what others use, too.
        """
        tensors = {name: self._entered(name, t, chunk) for name, t in self._chunks[chunk].items()}
        if chunk == 0:
            self._handed = list(tensors.values())  # kept, so that an `id` is nobody else's
            self._first = {id(t): self._call.tensors[name] for name, t in tensors.items()}
        before = {name: _version(t) for name, t in tensors.items() if self._is_others(name)}
        args, kwargs = self._call.filled({**tensors, **self._pieces[chunk]})
        output = forward(*args, **kwargs)
        traveller = current()
        for name, tensor in tensors.items():
            copied = traveller is not None and traveller.stand_ins.was_copied_and_written(tensor)
            if copied or before.get(name, _version(tensor)) != _version(tensor):
                raise RuntimeError(
                    f"`forward` modifies its argument `{name}` in place, but the caller or"
                    " another micro-batch needs the original. Work on a copy"
                    " (`inplace=False`, `x.clone()`)."
                )
        return output

    def argument(self, tensor: Tensor) -> Tensor | None:
        """The call's argument to which a tensor of the first micro-batch belongs."""
        return self._first.get(id(tensor))

    def count_writing(self) -> None:
        """Tell autograd about arguments that were written to."""
        microbatch.count_writing(self._call.tensors, self._dims, self._chunks)

    def wanting(self) -> list[Tensor]:
        """Arguments that require a gradient; the others are discarded."""
        self._chunks, self._pieces, self._first, self._handed = [], [], {}, []
        return [self._call.tensors[name] for name in self._wanting]

    def take_gradients(self) -> list[Tensor | None]:
        """Take their gradients accumulated since the last time."""
        return [self._gradient(name) for name in self._wanting]

    def _dealt(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Pieces of each micro-batch."""
        stops = list(accumulate(self._counts))
        return [
            {
                name: pieces.take(piece, stop - count, stop) if name in names else piece
                for name, piece in self._call.pieces.items()
            }
            for count, stop in zip(self._counts, stops, strict=True)
        ]

    def _entered(self, name: str, tensor: Tensor, chunk: int) -> Tensor:
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._leaves[chunk][name] = leaf
        return stage_values.enter(leaf)

    def _is_others(self, name: str) -> bool:
        """Return whether others use a micro-batch's tensor, too."""
        wanted = torch.is_grad_enabled() and self._call.tensors[name].requires_grad
        return wanted or (name not in self._dims and len(self._counts) > 1)

    def _gradient(self, name: str) -> Tensor | None:
        argument = self._call.tensors[name]
        found: list[Tensor | None] = []
        for leaves in self._leaves:
            leaf = leaves.get(name)
            found.append(None if leaf is None else leaf.grad)
            if leaf is not None:
                leaf.grad = None
        present = [gradient for gradient in found if gradient is not None]
        if not present:
            return None
        if name not in self._dims:
            return reduce(torch.add, present)
        pieces = torch.split(argument.detach(), list(self._counts), self._dims[name])
        pairs = zip(found, pieces, strict=True)
        return torch.cat(
            [torch.zeros_like(p) if g is None else g for g, p in pairs], self._dims[name]
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else version_of(tensor)
