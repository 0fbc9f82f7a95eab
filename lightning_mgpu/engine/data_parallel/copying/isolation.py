"""Deep copies for trial runs without side effects, of objects that structural copies share."""

import copy
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.data_parallel.copying import generators
from lightning_mgpu.engine.data_parallel.copying.structure import ATOMS

_MAX_BYTES = 2**30
_MAX_PARTS = 10_000
_SHARED = (
    *(torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader),
    *(types.FunctionType, nn.Module, type(Lock()), type(RLock())),
)
# Large, and nothing that a step changes.
_READ_ONLY = ("pandas", "polars", "pyarrow", "datasets", "PIL", "tokenizers", "transformers")


class UnsafeError(RuntimeError):
    """A trial run would have had an effect that cannot be undone."""


class Isolation:
    """Copy values so that changing a copy, however deep, does not change the original.

    Objects that cannot be copied, such as iterators of a DataLoader, give way to stand-ins that
    refuse to be used.

    Args:
        memo: What stands for known objects, by their ids; added to.
        is_shared: Objects to be left as they are, besides functions, datasets and optimizers.
    """

    def __init__(
        self, memo: dict[int, Any] | None = None, is_shared: Callable[[Any], bool] = lambda _: False
    ) -> None:
        self.generators: list[tuple[Any, Any]] = []
        self._memo: dict[int, Any] = {} if memo is None else memo
        self._is_shared = is_shared
        self._keep: list[Any] = []  # an id means something only as long as its object lives
        self._bytes = 0

    def __call__(self, value: Any) -> Any:
        """The copy of a value; the same one at every call.

        Raises:
            UnsafeError: The tensors and arrays are too large to be copied.
        """
        if self._is_left(value):
            return value
        if id(value) not in self._memo:
            new = self._copied(value)
            self._memo[id(value)] = new
            self._keep.append(value)
        return self._memo[id(value)]

    def drew(self) -> bool:
        """Return whether one of the copied random generators has been used."""
        return any(_state(old) != _state(new) for old, new in self.generators)

    def _is_left(self, value: Any) -> bool:
        if isinstance(value, (np.ndarray, Tensor, *generators.KINDS)):
            return False
        if type(value) in ATOMS or isinstance(value, (*ATOMS, *_SHARED)):
            return True
        library = type(value).__module__.partition(".")[0]
        read_only = library in _READ_ONLY and not isinstance(value, Mapping)
        return read_only or self._is_shared(value)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._count(
                value.numel() * value.element_size() if value.layout == torch.strided else 0
            )
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, np.ndarray) and value.dtype != object:
            self._count(value.nbytes)
            return value.copy()
        if isinstance(value, generators.KINDS):
            new = _copied_generator(value)
            self.generators.append((value, new))
            return new
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if type(value) is dict:
            return {key: self(part) for key, part in value.items()}
        if type(value) in (list, tuple, deque):
            parts = [self(part) for part in value]
            return deque(parts, value.maxlen) if isinstance(value, deque) else type(value)(parts)
        return self._deep_copied(value)

    def _deep_copied(self, value: Any) -> Any:
        memo = dict(self._memo)
        try:
            self._note_parts(value, memo)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new = copy.deepcopy(value, memo)
        except UnsafeError:
            raise
        except Exception:
            return _Uncopyable(value)
        self._memo.update(memo)
        return new

    def _note_parts(self, root: Any, memo: dict[int, Any]) -> None:
        """Decide upon what `deepcopy` would handle otherwise, wherever in an object it is."""
        seen: set[int] = {id(root)}
        pending = list(_parts_of(root))
        while pending:
            value = pending.pop()
            if id(value) in seen or id(value) in memo or type(value) in ATOMS:
                continue
            seen.add(id(value))
            self._keep.append(value)
            if len(seen) > _MAX_PARTS:
                raise ValueError("too many parts")
            if self._is_left(value):
                memo[id(value)] = value
            elif isinstance(value, (Tensor, np.ndarray, *generators.KINDS)):
                memo[id(value)] = self(value)
            else:
                pending.extend(_parts_of(value))

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > _MAX_BYTES:
            raise UnsafeError(f"more than {_MAX_BYTES >> 20} MiB of tensors hang on the model")


class _Uncopyable:
    """Stands for an object that cannot be copied."""

    def __init__(self, value: Any) -> None:
        vars(self)["_kind"] = type(value).__name__

    def __getattr__(self, name: str) -> Any:
        raise UnsafeError(f"it uses an object that cannot be copied, a `{vars(self)['_kind']}`")

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafeError(f"it uses an object that cannot be copied, a `{vars(self)['_kind']}`")

    def __next__(self) -> Any:
        raise UnsafeError(f"it uses an iterator that cannot be copied, a `{vars(self)['_kind']}`")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsafeError(f"it calls an object that cannot be copied, a `{vars(self)['_kind']}`")


def _parts_of(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    if hasattr(value, "__dict__") and not isinstance(value, type):
        yield from vars(value).values()
    for kind in type(value).__mro__:
        for name in _slots(kind):
            if hasattr(value, name):
                yield getattr(value, name)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _copied_generator(value: Any) -> Any:
    if not isinstance(value, torch.Generator):
        return copy.deepcopy(value)
    new = torch.Generator(value.device)
    new.set_state(value.get_state())
    return new


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return generator.getstate()
    return repr(generator.get_state())
