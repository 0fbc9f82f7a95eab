"""The arguments of a call, and which of them carry the batch."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.trace import Input

__all__: list[str] = []

_PLAIN = (str, bytes, bool, int, float, complex)


class Same:
    """Equal to another only if both hold the very same object, which lives as long as this."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


@dataclass(frozen=True)
class Call:
    """The arguments of a call, taken apart.

    Attributes:
        tensors: By name: the parameter of `forward`, and where in it.
        lists: Plain lists, which might hold a value per sample, by name.
        args: The positional arguments, with an `Input` for each tensor.
        kwargs: The same by name.
        key: What is equal for calls that differ in their tensors only.
    """

    tensors: dict[str, Tensor]
    lists: dict[str, Sequence[Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: Hashable

    @classmethod
    def of(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "Call":
        """Take the arguments of one call apart.

        Raises:
            TypeError: They do not fit the parameters of `forward`.
            SplitError: There is a `PackedSequence` among them.
        """
        signature = inspect.signature(forward)
        signature.bind(*args, **kwargs)
        named = [*zip(_positions(signature), args, strict=False), *kwargs.items()]
        found = [pair for name, value in named for pair in leaves(value, name)]
        inputs = {id(leaf): Input(name) for name, leaf in reversed(found) if _is_tensor(leaf)}
        tensors: dict[str, Tensor] = {}
        key: list[Hashable] = []
        for name, leaf in found:
            if isinstance(leaf, PackedSequence):
                raise SplitError(f"`{name}` is a `PackedSequence`, whose samples lie in no row.")
            if isinstance(leaf, Tensor):
                tensors[inputs[id(leaf)].name] = leaf
                key.append((name, inputs[id(leaf)].name))
            else:
                key.append((name, type(leaf), leaf if _is_hashable(leaf) else Same(leaf)))

        def put(leaf: Any) -> Any:
            return inputs.get(id(leaf), leaf)

        lists = {name: value for name, value in named if _is_plain_list(value)}
        filled = map_leaves(put, (tuple(args), dict(kwargs)))
        return cls(tensors, lists, filled[0], filled[1], tuple(key))


class Splitter:
    """Tells which tensors carry the batch, and takes none for granted.

    Args:
        split_args: Parameters of `forward`, by name or position, whose tensors are split.
        broadcast_args: Parameters whose tensors go to every micro-batch whole.

    Raises:
        ValueError: A parameter is in both.
    """

    def __init__(
        self, split_args: Iterable[str | int] = (), broadcast_args: Iterable[str | int] = ()
    ) -> None:
        self._split, self._broadcast = tuple(split_args), tuple(broadcast_args)
        both = set(self._split) & set(self._broadcast)
        if both:
            raise ValueError(
                f"`split_args` and `broadcast_args` both name {sorted(map(repr, both))};"
                " choose one."
            )
        self._known_whole: set[str] = set()

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
        batch: Sequence[Tensor],
        fixed: Callable[[], Iterable[Tensor]],
    ) -> tuple[int, frozenset[str]]:
        """The batch size, and the names of the tensors to be split.

        A tensor is split if it is named in `split_args`, if it comes from the step's batch, or if
        no other could carry the batch. Parameters, buffers and whatever has had another length than
        the batch in an earlier call are not.

        Args:
            call: The call.
            forward: Which is called.
            batch: The tensors of the step's batch, as far as known.
            fixed: The tensors that belong to the model.

        Raises:
            SplitError: It could be either way, or nothing can be split.
        """
        names = list(inspect.signature(forward).parameters)
        split, whole = self._named(self._split, names), self._named(self._broadcast, names)
        tensors = {n: t for n, t in call.tensors.items() if t.dim() and _argument(n) not in whole}
        chosen = {name for name in tensors if _argument(name) in split}
        size = _batch_size(tensors, chosen, batch)
        _check_lists(call, size, whole)
        for name in chosen:
            if tensors[name].shape[0] != size:
                raise SplitError(
                    f"`{name}` of shape {tuple(tensors[name].shape)} is named in `split_args`, but"
                    f" the batch has {size} samples."
                )
        others = {name: tensor for name, tensor in tensors.items() if name not in chosen}
        self._known_whole |= {name for name, t in others.items() if t.shape[0] != size}
        others = {name: t for name, t in others.items() if name not in self._known_whole}
        if len(chosen) + len(others) > 1:
            own = _storages(fixed())
            others = {name: t for name, t in others.items() if _storage(t) not in own}
        return size, frozenset(chosen | self._unnamed(others, chosen, size, batch))

    def _unnamed(
        self, tensors: dict[str, Tensor], chosen: set[str], size: int, batch: Sequence[Tensor]
    ) -> set[str]:
        if len(tensors) == 1 and not chosen:
            return set(tensors)
        known = _storages(batch)
        split = {
            name
            for name, tensor in tensors.items()
            if _storage(tensor) in known and not (tensor.dim() > 1 and tensor.shape[1] == size)
        }
        unclear = [name for name in tensors if name not in split]
        if unclear:
            shapes = ", ".join(
                f"`{name}` of shape {tuple(tensors[name].shape)}" for name in unclear
            )
            raise SplitError(
                f"As long as the batch ({size}), which may be chance: {shapes}. Name"
                f" `{_argument(unclear[0])}` in `split_args` if it has an entry per sample, else in"
                " `broadcast_args`."
            )
        return split

    def _named(self, given: Sequence[str | int], names: Sequence[str]) -> set[str]:
        return {names[entry] if isinstance(entry, int) else entry for entry in given}


def _batch_size(
    tensors: Mapping[str, Tensor], chosen: Iterable[str], batch: Sequence[Tensor]
) -> int:
    for name in chosen:
        return tensors[name].shape[0]
    known = _storages(batch)
    lengths = {tensor.shape[0] for tensor in batch if tensor.dim()}
    candidates = (
        [t for t in tensors.values() if _storage(t) in known],
        [t for t in tensors.values() if t.shape[0] in lengths],
        list(tensors.values()),
    )
    for found in candidates:
        if found:
            return found[0].shape[0]
    raise SplitError("none of the arguments is a tensor that could be split.")


def _check_lists(call: Call, size: int, whole: set[str]) -> None:
    for name, value in call.lists.items():
        if len(value) == size > 1 and _argument(name) not in whole:
            raise SplitError(
                f"`{name}` is a list as long as the batch ({size}), and lists are not split. Make"
                f" it a tensor, or name `{_argument(name)}` in `broadcast_args`."
            )


def _positions(signature: inspect.Signature) -> Iterable[str]:
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from (f"{name}[{index}]" for index in range(1_000_000))
        yield name


def _argument(name: str) -> str:
    """The parameter of `forward` that a tensor's name begins with."""
    return name.partition("[")[0].partition(".")[0]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, _PLAIN) for entry in value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {pointer for tensor in tensors if (pointer := _storage(tensor))}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
