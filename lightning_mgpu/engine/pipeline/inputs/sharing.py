"""Find the arguments of one call, beside the step's batch, that have an entry per sample."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_sequence
from lightning_mgpu.engine.pipeline.inputs import entries
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.refused import argument_of
from lightning_mgpu.engine.pipeline.microbatch import SplitError


class Sharing:
    """Decisions about the arguments of one call.

    Args:
        tensors: Those that may be split, by name.
        found: Lists and batches of graphs that are split, by name.
        given: The batch dimension of the parameters that the user has named.
        batch: The step's batch.

    Raises:
        SplitError: Nothing can be split, or something is not of the batch's length.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        found: dict[str, Any],
        given: Mapping[str, int],
        batch: StepBatch,
    ) -> None:
        self.batch = batch
        self._tensors, self.pieces = tensors, found
        self._named = {
            name: _checked(name, tensor, given[argument_of(name)])
            for name, tensor in tensors.items()
            if argument_of(name) in given
        }
        views = {n: batch.dimension(t) for n, t in tensors.items() if n not in self._named}
        self._seen = {name: dim for name, dim in views.items() if dim}
        self._suspected: list[str] = []
        self._elsewhere = self._other_dimensions()
        self.unproven: list[Any] = []
        """Tensors, samples first, and lists that are split though their length may be chance."""
        self.size = self._size()
        """Samples in the batch."""
        for name, piece in found.items():
            self._check_piece(name, piece, argument_of(name) in given)

    def _check_piece(self, name: str, piece: Any, is_named: bool) -> None:
        length = entries.length(piece)
        if length != self.size:
            raise SplitError(
                f"`{name}` is a `{type(piece).__name__}` of {length} samples, but the batch has"
                f" {self.size}."
            )
        if not is_sequence(piece) or is_named or self.batch.kind(piece) == "samples":
            return
        argument = argument_of(name)
        self.suppose(
            [piece],
            f"Ambiguous: the list `{name}` has the batch's length {length}. Name `{argument}`"
            " in `split_args` if it has an entry per sample, else in `broadcast_args`.",
        )

    def certain(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """The dimensions of tensors that are certain, and all other tensors.

        Raises:
            SplitError: A tensor that is named in `split_args` is of another length.
        """
        dims: dict[str, int] = {}
        for name, dim in self._named.items():
            length = self._tensors[name].shape[dim]
            if length == self.size:
                dims[name] = dim
            elif length != 1:  # one entry for all samples is broadcast, as on one device
                raise SplitError(
                    f"`{name}` of shape {tuple(self._tensors[name].shape)} is named in"
                    f" `split_args`, but the batch has {self.size} samples, and dimension"
                    f" {dim} has another length."
                )
        dims |= {n: dim for n, dim in self._seen.items() if self._length(n, dim) == self.size}
        for name, dim in self._elsewhere.items():
            dims[name], shape = dim, tuple(self._tensors[name].shape)
            doubt = (
                f"`{name}` of shape {shape} is split along its dimension {dim}, which has the"
                f" batch's length ({self.size}). Confirm that with"
                f" `split_args={{{argument_of(name)!r}: {dim}}}`, or use `broadcast_args`."
            )
            self.suppose([self._tensors[name].movedim(dim, 0)], doubt)
        named = (*self._named, *dims)
        return dims, {name: t for name, t in self._tensors.items() if name not in named}

    def suspect(self, name: str, tensor: Tensor, reason: str) -> None:
        """Note that a tensor is broadcast although it is as long as the batch."""
        argument = argument_of(name)
        self._suspected.append(
            f"`{name}` of shape {tuple(tensor.shape)} has the batch's length {self.size}, but"
            f" {reason}. Name `{argument}` in `split_args` if it has an entry per sample, else"
            " in `broadcast_args`."
        )

    def suppose(self, values: Sequence[Any], doubt: str) -> None:
        """Note that tensors or lists are split on an assumption that has to be checked."""
        self.unproven += values
        self._suspected.append(doubt)

    def doubts(self, dims: Mapping[str, int]) -> list[str]:
        """Reasons against splitting along these dimensions."""
        samples = self.batch.size
        doubts = list(self._suspected)
        for name, tensor in self._tensors.items():
            rows, argument = tensor.shape[0], argument_of(name)
            about = f"`{name}` of shape {tuple(tensor.shape)}"
            options = [d for d in range(1, tensor.dim()) if tensor.shape[d] == samples != 1]
            advice = "".join(
                f" If its dimension {d} is the batch: `split_args={{{argument!r}: {d}}}`."
                for d in options[:1]
            )
            if name in self._named or rows == 1:
                continue
            if name in dims and samples is not None and self._length(name, dims[name]) != samples:
                doubts.append(
                    f"{about} has {rows} rows, but the step's batch {samples} samples.{advice} If"
                    f" its rows are samples of their own: `split_args={[argument]}`."
                )
            elif name in dims and samples is None and self.batch.disagrees(tensor):
                doubts.append(
                    f"{about} comes from a batch whose tensors differ in length"
                    f" ({self.batch.problem}). Say which dimension is the batch:"
                    f" `split_args={{{argument!r}: 0}}`, or 1 and so on."
                )
            elif name not in dims and (options or self.batch.has(tensor)):
                doubts.append(
                    f"{about} goes to every micro-batch whole, since it has {rows} rows and the"
                    f" batch {self.size} samples.{advice} If every sample needs all of it:"
                    f" `broadcast_args={[argument]}`."
                )
        return doubts

    def _other_dimensions(self) -> dict[str, int]:
        """The only other dimensions that are as long as the batch, where no first one could be."""
        size, tensors = self.batch.size, self._tensors
        if self._named or self._seen or size in (None, 1):
            return {}
        if any(tensor.shape[0] % size == 0 for tensor in tensors.values()):
            return {}
        found = {n: [d for d in range(t.dim()) if t.shape[d] == size] for n, t in tensors.items()}
        return {name: dims[0] for name, dims in found.items() if len(dims) == 1}

    def _length(self, name: str, dim: int) -> int:
        return self._tensors[name].shape[dim]

    def _size(self) -> int:
        named = [self._length(n, dim) for n, dim in self._named.items()]
        long = [length for length in named if length != 1]
        seen = [self._length(name, dim) for name, dim in self._seen.items()]
        first = [t.shape[0] for t in self._tensors.values()]
        candidates = (
            long,
            seen,
            [self._length(name, dim) for name, dim in self._elsewhere.items()],
            [n for n in first if n == self.batch.size],
            [entries.length(piece) for piece in self.pieces.values()],
            [t.shape[0] for t in self._tensors.values() if self.batch.has(t) and t.shape[0] != 1],
            [n for n in first if n in self.batch.lengths],
            named,
            [n for n in first if n != 1],
            first,
        )
        for found in candidates:
            if found:
                return found[0]
        raise SplitError(
            "none of the arguments is a tensor that could be split, nor a list with an entry for"
            " each sample of the step's batch."
        )


def _checked(name: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise SplitError(
            f"`{name}` of shape {tuple(tensor.shape)} has no dimension {dim}, which `split_args`"
            " gives for it."
        )
    return dim % tensor.dim()
