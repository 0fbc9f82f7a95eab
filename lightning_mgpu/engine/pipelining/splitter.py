"""Tells which arguments of a call carry the batch, and along which dimension."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.origin import StepBatch, storages
from lightning_mgpu.engine.pipelining.refused import (
    argument_of,
    check_entries,
    check_graphs,
    check_kinds,
    check_lists,
)

__all__: list[str] = []

SplitArgs = str | int | Sequence[str | int] | Mapping[str | int, int] | None
"""Parameters by name or position; with a mapping, the batch dimension of each."""


@dataclass(frozen=True)
class Splitting:
    """How the arguments of a call are shared out among micro-batches.

    Attributes:
        size: Samples in the batch.
        dims: The batch dimension of each tensor that is split, by name; the others go whole.
        doubts: What the user is told if it cannot be shown that this is right.
        unproven: Tensors whose rows must differ for that.
    """

    size: int
    dims: dict[str, int]
    doubts: tuple[str, ...] = ()
    unproven: tuple[Tensor, ...] = ()


class Splitter:
    """Tells which tensors carry the batch, and takes none for granted.

    Args:
        split_args: Parameters of `forward`, by name or position, whose tensors are split along
            their first dimension; or a mapping from these to the dimension.
        broadcast_args: Parameters whose tensors go to every micro-batch whole.

    Raises:
        ValueError: A parameter is in both, or a dimension is no number.
    """

    def __init__(
        self,
        split_args: SplitArgs = (),
        broadcast_args: str | int | Sequence[str | int] | None = (),
    ) -> None:
        self._split = _dimensions(split_args)
        self._broadcast = tuple(_dimensions(broadcast_args))
        both = set(self._split) & set(self._broadcast)
        if both:
            raise ValueError(
                f"`split_args` and `broadcast_args` both name {sorted(map(repr, both))};"
                " choose one."
            )
        # Tensors that have gone whole since they were of another length than the batch.
        self._gone_whole: set[str] = set()

    def check(self, forward: Callable[..., Any]) -> None:
        """Refuse names and positions that `forward` does not have.

        Raises:
            ValueError: Names the argument and what `forward` takes.
        """
        parameters = inspect.signature(forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        for option, given in (("split_args", self._split), ("broadcast_args", self._broadcast)):
            for entry in given:
                known = entry in parameters if isinstance(entry, str) else entry < len(parameters)
                if not known:
                    raise ValueError(
                        f"`{option}` has {entry!r}, but `forward` takes {', '.join(parameters)}."
                    )

    def split(
        self,
        call: Call,
        forward: Callable[..., Any],
        batch: Any,
        fixed: Callable[[], Iterable[Tensor]],
    ) -> Splitting:
        """How the tensors of a call are to be split.

        A tensor is split if it is named in `split_args`, if it comes from the step's batch, or if
        no other could carry the batch: along its first dimension, or along the one that is the
        first of the batch's tensor of which it is a view. Parameters, buffers and tensors of
        another length than the batch are not.

        Args:
            call: The call.
            forward: Which is called.
            batch: The step's batch, as far as known.
            fixed: The tensors that belong to the model.

        Raises:
            SplitError: It could be either way, or nothing can be split.
        """
        names = list(inspect.signature(forward).parameters)
        given = {_named(entry, names): dim for entry, dim in self._split.items()}
        whole = {_named(entry, names) for entry in self._broadcast}
        check_kinds(call, whole)
        tensors = {n: t for n, t in call.tensors.items() if t.dim() and argument_of(n) not in whole}
        step_batch = StepBatch(batch)
        check_entries(call, step_batch.size, whole)
        check_graphs(call, step_batch.of_graphs, whole)
        sharing = _Sharing(tensors, given, step_batch)
        check_lists(call, sharing.size, whole)
        dims, rest = sharing.certain()
        self._split_rest(sharing, dims, rest, fixed)
        doubts = sharing.doubts(dims)
        return Splitting(sharing.size, dims, tuple(doubts), tuple(sharing.unproven))

    def _split_rest(
        self,
        sharing: "_Sharing",
        dims: dict[str, int],
        rest: dict[str, Tensor],
        fixed: Callable[[], Iterable[Tensor]],
    ) -> None:
        """Add those that are as long as the batch to `dims`, unless that may be chance."""
        size, batch = sharing.size, sharing.batch
        others = {name: t for name, t in rest.items() if t.shape[0] == size}
        self._gone_whole |= {n for n, t in rest.items() if t.shape[0] not in (1, size)}
        if len(dims) + len(others) > 1:
            own = storages(fixed())
            others = {name: t for name, t in others.items() if not storages([t]) & own}
        before = [
            name for name in others if name in self._gone_whole and not batch.has(others[name])
        ]
        for name in before:
            sharing.suspect(name, others.pop(name), "it has gone to every micro-batch whole before")
        if len(others) == 1 and not dims:
            dims.update(dict.fromkeys(others, 0))
            return
        split = {name for name, t in others.items() if batch.has(t)}
        split = {n for n in split if not (others[n].dim() > 1 and others[n].shape[1] == size)}
        unclear = [name for name in others if name not in split]
        if unclear:
            shapes = ", ".join(f"`{n}` of shape {tuple(others[n].shape)}" for n in unclear)
            text = (
                f"As long as the batch ({size}), which may be chance: {shapes}. Name"
                f" `{argument_of(unclear[0])}` in `split_args` if it has an entry per sample, else"
                " in `broadcast_args`."
            )
            if size != batch.size or any(size in others[n].shape[1:] for n in unclear):
                raise SplitError(text)
            sharing.suppose([others[name] for name in unclear], text)
        dims.update(dict.fromkeys([*split, *unclear], 0))


class _Sharing:
    """The arguments of one call beside the step's batch."""

    def __init__(
        self, tensors: dict[str, Tensor], given: Mapping[str, int], batch: StepBatch
    ) -> None:
        self.batch = batch
        self._tensors = tensors
        self._named = {
            name: _checked(name, tensor, given[argument_of(name)])
            for name, tensor in tensors.items()
            if argument_of(name) in given
        }
        found = {n: batch.dimension(t) for n, t in tensors.items() if n not in self._named}
        self._seen = {name: dim for name, dim in found.items() if dim}
        self._suspected: list[str] = []
        self._elsewhere = self._other_dimensions()
        self.unproven: list[Tensor] = []
        """Tensors, samples first, that are split though their length may be chance."""
        self.size = self._size()
        """Samples in the batch."""

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
                    f" `split_args`, but the batch has {self.size} samples, and its dimension"
                    f" {dim} is not as long."
                )
        dims |= {n: dim for n, dim in self._seen.items() if self._length(n, dim) == self.size}
        for name, dim in self._elsewhere.items():
            dims[name], shape = dim, tuple(self._tensors[name].shape)
            doubt = (
                f"`{name}` of shape {shape} is split along its dimension {dim}, which is as long"
                f" as the batch ({self.size}). Say whether that is right:"
                f" `split_args={{{argument_of(name)!r}: {dim}}}`, or `broadcast_args`."
            )
            self.suppose([self._tensors[name].movedim(dim, 0)], doubt)
        named = (*self._named, *dims)
        return dims, {name: t for name, t in self._tensors.items() if name not in named}

    def suspect(self, name: str, tensor: Tensor, reason: str) -> None:
        """Note that a tensor goes whole, though it is as long as the batch."""
        argument = argument_of(name)
        self._suspected.append(
            f"`{name}` of shape {tuple(tensor.shape)} is as long as the batch ({self.size}), but"
            f" {reason}. Name `{argument}` in `split_args` if it has an entry per sample, else in"
            " `broadcast_args`."
        )

    def suppose(self, tensors: Sequence[Tensor], doubt: str) -> None:
        """Note that tensors are split, which is to be shown to be right."""
        self.unproven += tensors
        self._suspected.append(doubt)

    def doubts(self, dims: Mapping[str, int]) -> list[str]:
        """What speaks against splitting along these dimensions."""
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
        """The only ones that are as long as the step's batch, where no first one could be."""
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
            [t.shape[0] for t in self._tensors.values() if self.batch.has(t) and t.shape[0] != 1],
            [n for n in first if n in self.batch.lengths],
            named,
            [n for n in first if n != 1],
            first,
        )
        for found in candidates:
            if found:
                return found[0]
        raise SplitError("none of the arguments is a tensor that could be split.")


def _dimensions(given: SplitArgs) -> dict[str | int, int]:
    """The batch dimension of each parameter that is named."""
    if given is None:
        return {}
    if isinstance(given, (str, int)):
        return {given: 0}
    if not isinstance(given, Mapping):
        return dict.fromkeys(given, 0)
    for name, dim in given.items():
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ValueError(
                f"`split_args={{{name!r}: {dim!r}}}`: give the number of the batch's dimension,"
                " such as 1 for tensors of shape (time, batch, features)."
            )
    return dict(given)


def _checked(name: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise SplitError(
            f"`{name}` of shape {tuple(tensor.shape)} has no dimension {dim}, which `split_args`"
            " gives for it."
        )
    return dim % tensor.dim()


def _named(entry: str | int, names: Sequence[str]) -> str:
    return names[entry] if isinstance(entry, int) else entry
