"""Arguments of a call, split into tensors, pieces and structure."""

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.engine.batch.containers import is_container, parts, rebuild
from lightning_mgpu.engine.batch.graphs import is_graph_batch
from lightning_mgpu.engine.pipeline.microbatch import SplitError

log = logging.getLogger(__name__)

_PLAIN = (str, bytes, bool, int, float, complex)
_FLAGS = (bool, type(None))


class Input:
    """Placeholder of a tensor or a piece among the arguments of a call."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True)
class CallArguments:
    """Arguments of a call, split into tensors, pieces and structure.

    Attributes:
        tensors: By name: the parameter of `forward`, and where in it.
        pieces: Lists that may have an entry per sample, and batches of graphs, by name.
        objects: What is neither a container, a tensor, a piece nor a plain value, by name.
        args: The positional arguments, with an `Input` for each tensor and piece.
        kwargs: The same by name.
        kind: What is equal for calls of one structure, whatever the numbers and texts in them.
    """

    tensors: dict[str, Tensor]
    pieces: dict[str, Any]
    objects: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Hashable

    @classmethod
    def of(
        cls,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        is_piece: Callable[[str, Any], bool],
    ) -> "CallArguments":
        """Take the arguments of one call apart.

        Args:
            forward: What is called.
            args: The positional arguments.
            kwargs: The same by name.
            is_piece: Whether a container is not to be taken apart.

        Raises:
            TypeError: They do not fit the parameters of `forward`.
            SplitError: There is a `PackedSequence` among them.
        """
        signature = inspect.signature(forward)
        signature.bind(*args, **kwargs)
        named = [*zip(_positions(signature), args, strict=False), *kwargs.items()]
        found = [pair for name, value in named for pair in _leaves(value, name, is_piece)]
        whole = [(n, leaf) for n, leaf in found if isinstance(leaf, Tensor) or _is_piece(leaf)]
        inputs = {id(leaf): Input(name) for name, leaf in reversed(whole)}
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, Any] = {}
        kind: list[Hashable] = []
        for name, leaf in found:
            if isinstance(leaf, PackedSequence):
                raise SplitError(
                    f"`{name}` is a `PackedSequence`, whose samples are interleaved. Pass the"
                    " padded tensor and the lengths, and pack them in a submodule."
                )
            if isinstance(leaf, Tensor):
                tensors[inputs[id(leaf)].name] = leaf
                kind.append((name, leaf.dim()))
            elif _is_piece(leaf):
                pieces[inputs[id(leaf)].name] = leaf
                kind.append((name, type(leaf)))
            else:
                kind.append((name, leaf if isinstance(leaf, _FLAGS) else type(leaf)))

        def put(value: Any) -> Any:
            if id(value) in inputs or not is_container(value):
                return inputs.get(id(value), value)
            return rebuild(value, [put(part) for _, part in parts(value)])

        objects = {
            n: leaf for n, leaf in found if id(leaf) not in inputs and not isinstance(leaf, _PLAIN)
        }
        filled = tuple(map(put, args)), {name: put(value) for name, value in kwargs.items()}
        return cls(tensors, pieces, objects, *filled, tuple(kind))

    def filled(
        self, inputs: Mapping[str, Any], objects: Mapping[int, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with other tensors and pieces in their places.

        Args:
            inputs: By name.
            objects: Others in the places of objects, by their `id`.
        """

        def put(leaf: Any) -> Any:
            if isinstance(leaf, Input):
                return inputs[leaf.name]
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


def _leaves(
    value: Any, name: str, is_piece: Callable[[str, Any], bool]
) -> Iterator[tuple[str, Any]]:
    """Every leaf and piece, each with its access path."""
    if not is_container(value) or is_piece(name, value):
        yield name, value
        return
    for below, part in parts(value):
        yield from _leaves(part, name + below, is_piece)


def _is_piece(leaf: Any) -> bool:
    return is_graph_batch(leaf) or is_container(leaf)
