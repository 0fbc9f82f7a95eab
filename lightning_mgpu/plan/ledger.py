"""Count the bytes that layers pass on and keep for backward while a pipeline runs."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu.engine.dispatch import EagerMode
from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.runtime import graph_position
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller, current

CALLER = -1


class Holders(NamedTuple):
    """Layers that hold or use a piece of memory.

    Attributes:
        keepers: The layers whose backward needs it.
        producer: The layer that makes it for others, `CALLER`, or `None` if it is for no other.
        consumers: The layers that others made it for; `CALLER` among them.
    """

    keepers: frozenset[int]
    producer: int | None
    consumers: frozenset[int]


class Ledger:
    """Bytes of all tensors made by forward passes, each memory once.

    Args:
        own: Tensors that belong to the model, which do not count.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_memory(tensor) for tensor in own}
        self._batch: set[int] = set()
        self._entries: list[_MemoryRecord] = []
        self._latest: dict[int, _MemoryRecord] = {}

    def total(self) -> dict[Holders, int]:
        """Bytes by their holders."""
        found: dict[Holders, int] = {}
        for entry in self._entries:
            consumers = frozenset(entry.users - {entry.producer})
            producer = entry.producer if consumers else None
            who = Holders(frozenset(entry.keepers), producer, consumers)
            found[who] = found.get(who, 0) + entry.size
        return found

    def given(self, tensor: Tensor) -> None:
        """Record a tensor of the caller's."""
        self._batch.add(_memory(tensor) or 0)
        self._entry(tensor, CALLER)

    def made(self, tensor: Tensor, layer: int) -> None:
        """Record a tensor made by a layer; whatever had its memory before is gone."""
        self._latest.pop(_memory(tensor) or 0, None)
        self._entry(tensor, layer)

    def used(self, tensor: Tensor, layer: int, producer: int) -> None:
        """Record a tensor used by a layer or the caller.

        Args:
            tensor: What is taken.
            layer: By whom.
            producer: Who has made it, if that has not been seen.
        """
        self._entry(tensor, producer).users.add(layer)

    def kept(self, tensor: Tensor, layer: int) -> None:
        """Record a tensor needed by a layer's backward."""
        self._entry(tensor, layer).keepers.add(layer)

    def _entry(self, tensor: Tensor, producer: int) -> "_MemoryRecord":
        key = _memory(tensor)
        if key is None or key in self._own:
            return _MemoryRecord(producer)
        size = tensor.untyped_storage().nbytes()  # a view holds on to all of it
        if key in self._batch:
            # Micro-batches are views of one memory.
            key, size = tensor.data_ptr(), min(size, tensor.nbytes)
        if key not in self._latest:
            self._latest[key] = _MemoryRecord(producer)
            self._entries.append(self._latest[key])
        entry = self._latest[key]
        entry.size = max(entry.size, size)
        return entry


@dataclass
class _MemoryRecord:
    producer: int
    size: int = 0
    keepers: set[int] = field(default_factory=set)
    users: set[int] = field(default_factory=set)


class Watched:
    """Wrapper of a pipeline's `forward` that records into a ledger.

    Args:
        forward: The `forward`. Each layer is a stage of its own.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self.ledger: Ledger | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ledger, traveller = self.ledger, current()
        if ledger is None or traveller is None:
            return self._forward(*args, **kwargs)
        for tensor in stage_values.tensors((args, kwargs)):
            ledger.given(tensor)

        def pack(tensor: Tensor) -> Tensor:
            ledger.kept(tensor, traveller.stage or 0)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), _Watching(ledger, traveller):
            output = self._forward(*args, **kwargs)
        for tensor in stage_values.tensors(output):
            ledger.used(tensor, CALLER, _stage_of(tensor, traveller))
        return output


class _Watching(EagerMode):
    """Mode that records the inputs and outputs of each operation."""

    def __init__(self, ledger: Ledger, traveller: Traveller) -> None:
        super().__init__()
        self._ledger, self._traveller = ledger, traveller

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._traveller.stage or 0
        taken = stage_values.tensors((args, kwargs))
        for tensor in taken:
            self._ledger.used(tensor, layer, _stage_of(tensor, self._traveller))
        output = func(*args, **kwargs)
        before = {_memory(tensor) for tensor in taken}
        for tensor in stage_values.tensors(output):
            if _memory(tensor) not in before:
                self._ledger.made(tensor, layer)
        return output


def _stage_of(tensor: Tensor, traveller: Traveller) -> int:
    """Stage that made a tensor, as far as autograd knows: compiled operations may be hidden."""
    known = graph_position.of(tensor) is not None
    stage: int = traveller.graph.of(tensor).stage if known else traveller.stage or 0
    return stage


def _memory(tensor: Tensor) -> int | None:
    """Address of a tensor's memory; `None` if it has none, or several pieces."""
    if tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None
