"""Decide which arguments of a call carry the batch, and along which dimension."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_sequence, leaves
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.entries import may_be_columns, may_be_entries
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch, storages
from lightning_mgpu.engine.pipeline.inputs.refused import (
    argument_of,
    check_graphs,
    check_kinds,
    check_pieces,
)
from lightning_mgpu.engine.pipeline.inputs.sharing import Sharing
from lightning_mgpu.engine.pipeline.microbatch import SplitError

SplitArgs = str | int | Sequence[str | int] | Mapping[str | int, int] | None
"""Parameters by name or position; with a mapping, the batch dimension of each."""


@dataclass(frozen=True)
class Splitting:
    """Decision how to split a call's arguments into micro-batches.

    Attributes:
        size: Samples in the batch.
        dims: The batch dimension of each tensor that is split, by name; the others go whole.
        pieces: Names of the lists and batches of graphs that are split; the others go whole.
        doubts: What the user is told if it cannot be shown that this is right.
        unproven: Tensors whose rows, and lists whose entries, must differ for that.
    """

    size: int
    dims: dict[str, int]
    pieces: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    unproven: tuple[Any, ...] = ()


class Splitter:
    """Decide which tensors of a call carry the batch, and note what is unproven.

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

    def pieces(
        self, forward: Callable[..., Any], arguments: Any, batch: StepBatch
    ) -> Callable[[str, Any], bool]:
        """Return a predicate that says whether a container argument may be split by entry.

        Args:
            forward: Which is called.
            arguments: With what.
            batch: The step's batch; if its size is unknown, that of the first tensor is taken.
        """
        names = list(inspect.signature(forward).parameters)
        given = {_named(entry, names) for entry in self._split}
        whole = {_named(entry, names) for entry in self._broadcast}
        tensors = (leaf for _, leaf in leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim())
        size = batch.size or next((tensor.shape[0] for tensor in tensors), 1)

        def tell(name: str, value: Any) -> bool:
            if argument_of(name) in whole:
                return False
            kind = batch.kind(value)
            if kind is not None:
                return size > 1 and kind == "samples"
            if name in given and is_sequence(value) and not may_be_columns(value):
                return True
            return size > 1 and may_be_entries(value, size)

        return tell

    def split(
        self,
        call: CallArguments,
        forward: Callable[..., Any],
        batch: StepBatch,
        fixed: Callable[[], Iterable[Tensor]],
    ) -> Splitting:
        """Decide how the arguments of a call are split.

        A tensor is split if it is named in `split_args`, if it comes from the step's batch, or if
        no other could carry the batch: along its first dimension, or along the one that is the
        first of the batch's tensor of which it is a view. Parameters, buffers and tensors of
        another length than the batch are not. Lists with an entry per sample are split by entries,
        batches of graphs by graphs.

        Args:
            call: The call.
            forward: Which is called.
            batch: The step's batch.
            fixed: The tensors that belong to the model.

        Raises:
            SplitError: It could be either way, or nothing can be split.
        """
        names = list(inspect.signature(forward).parameters)
        given = {_named(entry, names): dim for entry, dim in self._split.items()}
        whole = {_named(entry, names) for entry in self._broadcast}
        check_kinds(call, whole)
        tensors = {n: t for n, t in call.tensors.items() if t.dim() and argument_of(n) not in whole}
        check_graphs(call, batch.of_graphs, whole)
        check_pieces(call, whole)
        found = {n: piece for n, piece in call.pieces.items() if argument_of(n) not in whole}
        sharing = Sharing(tensors, found, given, batch)
        dims, rest = sharing.certain()
        self._split_rest(sharing, dims, rest, fixed)
        doubts = sharing.doubts(dims)
        return Splitting(sharing.size, dims, tuple(found), tuple(doubts), tuple(sharing.unproven))

    def _split_rest(
        self,
        sharing: Sharing,
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
            sharing.suspect(name, others.pop(name), "it went to every micro-batch whole before")
        if len(others) == 1 and not dims:
            dims.update(dict.fromkeys(others, 0))
            return
        split = {name for name, t in others.items() if batch.has(t)}
        split = {n for n in split if not (others[n].dim() > 1 and others[n].shape[1] == size)}
        unclear = [name for name in others if name not in split]
        if unclear:
            shapes = ", ".join(f"`{n}` of shape {tuple(others[n].shape)}" for n in unclear)
            text = (
                f"Ambiguous: {shapes}, as long as the batch ({size}). Name"
                f" `{argument_of(unclear[0])}` in `split_args` if dimension 0 is the batch,"
                " else in `broadcast_args`."
            )
            if size != batch.size or any(size in others[n].shape[1:] for n in unclear):
                raise SplitError(text)
            sharing.suppose([others[name] for name in unclear], text)
        dims.update(dict.fromkeys([*split, *unclear], 0))


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


def _named(entry: str | int, names: Sequence[str]) -> str:
    return names[entry] if isinstance(entry, int) else entry
