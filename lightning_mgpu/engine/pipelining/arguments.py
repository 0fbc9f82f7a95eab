"""The arguments of a call, taken apart."""

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipelining.microbatch import SplitError

log = logging.getLogger(__name__)

__all__: list[str] = []

_PLAIN = (str, bytes, bool, int, float, complex)
_FLAGS = (bool, type(None))


class Input:
    """Stands for a tensor among the arguments of a call."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True)
class Call:
    """The arguments of a call, taken apart.

    Attributes:
        tensors: By name: the parameter of `forward`, and where in it.
        lists: Plain lists, which might hold a value per sample, by name.
        sequences: Other lists and tuples, by name.
        objects: What is neither a container, a tensor nor a plain value, by name.
        args: The positional arguments, with an `Input` for each tensor.
        kwargs: The same by name.
        kind: What is equal for calls of one structure, whatever the numbers and texts in them.
    """

    tensors: dict[str, Tensor]
    lists: dict[str, Sequence[Any]]
    sequences: dict[str, Sequence[Any]]
    objects: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
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
        kind: list[Hashable] = []
        for name, leaf in found:
            if isinstance(leaf, PackedSequence):
                raise SplitError(
                    f"`{name}` is a `PackedSequence`, whose samples lie in no row. Hand on the"
                    " padded tensor and the lengths, and pack them in a submodule."
                )
            if isinstance(leaf, Tensor):
                tensors[inputs[id(leaf)].name] = leaf
                kind.append((name, leaf.dim()))
            else:
                kind.append((name, leaf if isinstance(leaf, _FLAGS) else type(leaf)))

        def put(leaf: Any) -> Any:
            return inputs.get(id(leaf), leaf)

        lists = {name: value for name, value in named if _is_plain_list(value)}
        sequences: dict[str, Sequence[Any]] = {
            n: v for n, v in named if isinstance(v, (list, tuple)) and n not in lists
        }
        objects = {n: leaf for n, leaf in found if not isinstance(leaf, (Tensor, *_PLAIN))}
        filled = map_leaves(put, (tuple(args), dict(kwargs)))
        return cls(tensors, lists, sequences, objects, filled[0], filled[1], tuple(kind))

    def filled(
        self, tensors: Mapping[str, Any], objects: Mapping[int, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with other tensors in their places.

        Args:
            tensors: By name.
            objects: Others in the places of objects, by their `id`.
        """

        def put(leaf: Any) -> Any:
            if isinstance(leaf, Input):
                return tensors[leaf.name]
            return (objects or {}).get(id(leaf), leaf)

        made: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves(put, (self.args, self.kwargs))
        return made

    def stateful(self) -> dict[str, Any]:
        """Objects that `forward` may write to, such as a cache of keys and values, by name."""
        return {name: value for name, value in self.objects.items() if _has_state(value)}

    def copied_objects(self) -> dict[int, Any]:
        """Copies of those objects, by the `id` of each; without those that cannot be copied."""
        copies: dict[int, Any] = {}
        for value in self.stateful().values():
            try:
                copies[id(value)] = copy.deepcopy(value)
            except Exception:
                log.debug("A `%s` cannot be copied.", type(value).__name__, exc_info=True)
        return copies


def _positions(signature: inspect.Signature) -> Iterable[str]:
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from (f"{name}[{index}]" for index in range(1_000_000))
        yield name


def _has_state(value: Any) -> bool:
    if isinstance(value, (type, nn.Module)) or callable(value):
        return False
    return bool(getattr(value, "__dict__", None)) and not isinstance(value, torch.Generator)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, _PLAIN) for entry in value)
