"""Find out whether a step changes the small tensors that it keeps by additions alone.

Watching every operation costs some microseconds each. So it is done on one replica, for the first
steps of each kind, and again after a step has written to a tensor that had not been written to.
"""

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mgpu._compat.python import frame_above
from lightning_mgpu._compat.torch import (
    ATEN_ADD_TO_EACH,
    ATEN_COPY,
    TorchDispatchMode,
    schema_of,
)
from lightning_mgpu._compat.torch_pickling import identity_of
from lightning_mgpu.engine.data_parallel.copying.tensors import TensorCopy
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import (
    Additions,
    is_constant_operand,
)

_FIRST_STEPS = 2

_aten = torch.ops.aten
_ADDS_IN_PLACE = frozenset(
    {_aten.add_, _aten.sub_, _aten.index_add_, _aten.scatter_add_, ATEN_ADD_TO_EACH}
)
_ADDS = frozenset({_aten.add, _aten.sub, _aten.index_add, _aten.scatter_add})
_COPIES = frozenset({_aten.clone, ATEN_COPY})


class AdditionWatch:
    """Record of the operations on each tensor, by name."""

    def __init__(self) -> None:
        self._known: dict[str, Additions | None] = {}
        self._kinds: dict[str, int] = {}
        self._unknown = False
        self._watching = False

    def begin(self, kind: str) -> "WatchMode | None":
        """Start a step: a mode to run one replica in, or `None` if that is not worth it."""
        steps = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._watching = steps <= _FIRST_STEPS or self._unknown
        self._unknown = False
        if not self._watching:
            return None
        return WatchMode()

    def learn(self, mode: "WatchMode", copies: Iterable[TensorCopy]) -> None:
        """Take over the additions that a mode has recorded."""
        for copied in copies:
            seen = mode.operations(copied.copied)
            if seen is not _NEVER:
                self._known[copied.name] = seen

    def of(self, copied: TensorCopy) -> Additions | None:
        """Additions by which the step changes or replaces a tensor; `None` if others or unknown."""
        if copied.name not in self._known:
            if self._watching:
                self._known[copied.name] = None  # replaced, and not by anything made of it
            else:
                self._unknown = True
        return self._known.get(copied.name)


_NEVER: Any = object()


class WatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records additions to all tensors that are written to or summed, by their memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, Additions | None] = {}
        self._roots: dict[int, int] = {}
        self._keep: list[Any] = []  # memory that is given back may come again under its address

    def operations(self, tensor: Tensor) -> Additions | None:
        """Additions to a tensor; `None` if there were other operations."""
        return self._seen.get(_memory(tensor), _NEVER)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _ADDS or packet in _COPIES:
            self._derive(packet, args, result)
        elif schema_of(func).is_mutable and args:
            self._write(packet, args, kwargs or {})
        return result

    def _derive(self, packet: Any, args: tuple[Any, ...], result: Any) -> None:
        """Note that a new tensor is another one with something added."""
        if not isinstance(args[0], Tensor) or args[0].numel() > 2**16:
            return
        operands = args[:1] if packet is not _aten.add else args[:2]
        for operand in operands:
            if isinstance(operand, Tensor) and operand.shape == result.shape:
                root = self._roots.get(_memory(operand), _memory(operand))
                self._roots.setdefault(_memory(result), root)
        self._keep.append((args[:2], result))
        if packet in _ADDS:
            constant = _is_constant(args)
            for operand in operands:
                if isinstance(operand, Tensor) and operand.shape == result.shape:
                    self._add(_memory(operand), constant)

    def _write(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        for target in targets:
            if not isinstance(target, Tensor):
                continue
            memory = _memory(target)
            adds = packet in _ADDS_IN_PLACE or (
                packet is _aten.index_put_ and (kwargs.get("accumulate") or args[3:4] == (True,))
            )
            if adds:
                self._add(memory, _is_constant(args))
            elif not (packet is _aten.copy_ and self._comes_of(args[1], memory)):
                self._seen[memory] = None
                self._keep.append(target)

    def _comes_of(self, source: Any, memory: int) -> bool:
        if not isinstance(source, Tensor):
            return False
        return memory in (_memory(source), self._roots.get(_memory(source)))

    def _add(self, memory: int, constant: bool) -> None:
        memory = self._roots.get(memory, memory)
        known = self._seen.get(memory, Additions())
        self._seen[memory] = None if known is None else known.more(constant)


def _memory(tensor: Any) -> int:
    try:
        return identity_of(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # no memory of its own
        return id(tensor)


def _is_constant(args: tuple[Any, ...]) -> bool:
    """Return whether a constant of the user's source was added."""
    return len(args) > 1 and not isinstance(args[1], (list, tuple)) and _user_constant()


def _user_constant() -> bool:
    frame: types.FrameType | None = frame_above(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("torch", __name__.partition(".")[0])):
            return is_constant_operand(frame)
        frame = frame.f_back
    return False
