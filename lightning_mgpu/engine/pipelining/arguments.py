"""The arguments of a call, taken apart."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipelining.microbatch import SplitError
from lightning_mgpu.engine.pipelining.trace import Input

__all__: list[str] = []

_PLAIN = (str, bytes, bool, int, float, complex)
_FLAGS = (bool, type(None))


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
        objects: What is neither a container, a tensor nor a plain value, by name.
        args: The positional arguments, with an `Input` for each tensor.
        kwargs: The same by name.
        key: What is equal for calls that differ in their tensors only.
        kind: What is equal for calls of one structure, whatever the numbers and texts in them.
    """

    tensors: dict[str, Tensor]
    lists: dict[str, Sequence[Any]]
    objects: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: Hashable
    kind: Hashable

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
        kind: list[Hashable] = []
        for name, leaf in found:
            if isinstance(leaf, PackedSequence):
                raise SplitError(
                    f"`{name}` is a `PackedSequence`, whose samples lie in no row. Hand on the"
                    " padded tensor and the lengths, and pack them in a submodule."
                )
            if isinstance(leaf, Tensor):
                tensors[inputs[id(leaf)].name] = leaf
                key.append((name, inputs[id(leaf)].name))
                kind.append((name, leaf.dim()))
            else:
                key.append((name, type(leaf), leaf if _is_hashable(leaf) else Same(leaf)))
                kind.append((name, leaf if isinstance(leaf, _FLAGS) else type(leaf)))

        def put(leaf: Any) -> Any:
            return inputs.get(id(leaf), leaf)

        lists = {name: value for name, value in named if _is_plain_list(value)}
        objects = {n: leaf for n, leaf in found if not isinstance(leaf, (Tensor, *_PLAIN))}
        filled = map_leaves(put, (tuple(args), dict(kwargs)))
        return cls(tensors, lists, objects, filled[0], filled[1], tuple(key), tuple(kind))


def _positions(signature: inspect.Signature) -> Iterable[str]:
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from (f"{name}[{index}]" for index in range(1_000_000))
        yield name


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
