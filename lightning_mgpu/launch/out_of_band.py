"""Send large tensors beside a pickle instead of within it, straight into fresh memory."""

import contextvars
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pickle import PickleBuffer
from typing import Any

import torch
from torch import UntypedStorage
from torch.storage import TypedStorage

from lightning_mgpu._compat.torch_pickling import identity_of, typed, untyped
from lightning_mgpu.launch.pickler import Pickler

# Below this, a buffer of its own costs more than it saves.
_MIN_BYTES = 2**20


class Aside:
    """Storages that one pickle leaves out, in the order of their discovery.

    Args:
        tensors: Whose storages to leave out, where they are large enough and on the CPU.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors if _is_plain(tensor)]
        self._wanted = {identity_of(s): s for s in storages if s.nbytes() >= _MIN_BYTES}
        self._taken: dict[int, UntypedStorage] = {}

    def buffers(self) -> list[PickleBuffer]:
        """The memory of the storages left out: itself, not a copy."""
        return [_memory_of(storage) for storage in self._taken.values()]

    def has(self, obj: Any) -> bool:
        """Return whether `obj` is a storage to leave out."""
        if not self._wanted or not isinstance(obj, (UntypedStorage, TypedStorage)):
            return False
        return identity_of(_untyped(obj)) in self._wanted

    def reduce(self, obj: Any) -> tuple[Any, ...]:
        """Leave out the storage `obj`; return its placeholder in the pickle."""
        key = identity_of(_untyped(obj))
        self._taken.setdefault(key, self._wanted[key])
        index = list(self._taken).index(key)
        return _arrived, (index, obj.dtype if isinstance(obj, TypedStorage) else None)


class AsidePickler(Pickler):
    """Pickler for `torch.save` that leaves out the storages of the current `Aside`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Ask our reducer first in the pickler that `torch.save` derives from this one."""
        super().__init_subclass__(**kwargs)
        theirs = cls.persistent_id

        def persistent_id(self: Any, obj: Any) -> Any:
            return None if _leaving_out.get().has(obj) else theirs(self, obj)

        cls.persistent_id = persistent_id

    def reducer_override(self, obj: Any) -> Any:
        aside = _leaving_out.get()
        return aside.reduce(obj) if aside.has(obj) else super().reducer_override(obj)


@contextmanager
def leaving_out(aside: Aside) -> Iterator[None]:
    """Context in which an `AsidePickler` leaves out the storages of `aside`."""
    token = _leaving_out.set(aside)
    try:
        yield
    finally:
        _leaving_out.reset(token)


@contextmanager
def putting_in(buffers: Sequence[Any]) -> Iterator[None]:
    """Context in which unpickling finds `buffers` in place of the storages left out."""
    # One storage for each, however many tensors view it.
    storages = [torch.frombuffer(b, dtype=torch.uint8).untyped_storage() for b in buffers]
    token = _putting_in.set(storages)
    try:
        yield
    finally:
        _putting_in.reset(token)


_leaving_out: contextvars.ContextVar[Aside] = contextvars.ContextVar("_leaving_out")
_putting_in: contextvars.ContextVar[list[UntypedStorage]] = contextvars.ContextVar("_putting_in")


def _memory_of(storage: UntypedStorage) -> PickleBuffer:
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.owner = storage  # type: ignore[attr-defined]  # or it might be freed underneath
    return PickleBuffer(memory)


def _arrived(index: int, dtype: torch.dtype | None) -> UntypedStorage | TypedStorage:
    storage = _putting_in.get()[index]
    if dtype is None:
        return storage
    return typed(storage, dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` has memory of its own, unlike fake and distributed ones."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _untyped(obj: UntypedStorage | TypedStorage) -> UntypedStorage:
    return untyped(obj) if isinstance(obj, TypedStorage) else obj
