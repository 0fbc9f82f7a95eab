"""Translate references to a module's parts into those of a structural copy."""

import functools
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from lightning_mgpu.engine.data_parallel.copying import generators
from lightning_mgpu.engine.data_parallel.copying.containers import (
    Holding,
    is_copyable_object,
    new_object,
    state_of,
)
from lightning_mgpu.engine.data_parallel.copying.structure import ATOMS, MAX_CONTAINER, closed_over
from lightning_mgpu.engine.data_parallel.copying.tensors import Tensors
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import Sites, track

# Longer lists and dicts than these are copied in one go: their numbers are not tracked, and tensors
# in them are shared. Long lists are logs, but a dict may well count a thousand classes.
_LONG_LIST = 128
LONG_DICT = 1024
_MOST_BYTES = 2**16
_MOST_OBJECTS = 1000


class NotPlainError(Exception):
    """An object leads to more than plain data."""


class Remap:
    """Translates references from the original's parts to a copy's.

    Args:
        memo: The copies, by the `id` of their originals, which must outlive this.
        tensors: The copy's tensors. Without them, only what is in `memo` is replaced: lists and
            dicts, tensors and numbers stay the original's.
        random: The copy's generators.
        is_opaque: Which objects are never copied.

    Attributes:
        where: What is being translated, in words.
        holdings: This step's copies of containers, arrays and plain objects, by the ids of the
            originals.
        sites: What tracked numbers record about this step.
    """

    def __init__(
        self,
        memo: dict[int, Any],
        tensors: Tensors | None = None,
        random: generators.Generators | None = None,
        is_opaque: Callable[[Any], bool] = lambda _: False,
    ) -> None:
        self.memo = memo
        self.where = ""
        self.holdings: dict[int, Holding] = {}
        self.sites: Sites = Counter()
        self._tensors, self._generators = tensors, random
        self._copies = tensors is not None
        self._is_opaque = is_opaque
        self._tracks = False
        self._rigid = False
        self._shared: dict[int, Any] = {}
        self._within: list[int] = []

    def begin(self) -> None:
        """Forget the containers of the last step."""
        self.holdings = {}
        self.sites = Counter()

    def __call__(self, value: Any) -> Any:
        """Return the copy's counterpart of `value`: `value` itself if it leads to no part."""
        kind = type(value)
        if kind is int or kind is float:
            return track(value, self.sites) if self._tracks else value
        copied = self.memo.get(id(value))
        if copied is not None:
            return copied
        if isinstance(value, Tensor):
            return value if self._tensors is None or self._rigid else self._tensor(value)
        if kind in generators.KINDS:
            return value if self._generators is None else self._generators.of(value)
        if kind is np.ndarray:
            return self._array(value) if self._copies else value
        if kind in ATOMS:
            return value
        if isinstance(value, (list, dict, deque, set)):
            return self._container(value) if self._copies else value
        return self._other(value)

    def at(self, name: str, value: Any) -> Any:
        """Translate the attribute `name` of what `where` says."""
        return self._at(f".{name}", value)

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Context in which numbers are replaced by ones that remember additions."""
        before, self._tracks = self._tracks, self._copies
        try:
            yield
        finally:
            self._tracks = before

    def _at(self, name: str, value: Any) -> Any:
        owner, self.where = self.where, self.where + name
        try:
            return self(value)
        finally:
            self.where = owner

    @contextmanager
    def _fixed(self, rigid: bool = False) -> Iterator[None]:
        """Context for values without a place of their own: entries of tuples and sets, closures."""
        before = self._tracks, self._rigid
        self._tracks, self._rigid = False, rigid or self._rigid
        try:
            yield
        finally:
            self._tracks, self._rigid = before

    def _tensor(self, value: Tensor) -> Tensor:
        assert self._tensors is not None
        return self._tensors.of(value, self.where)

    def _other(self, value: Any) -> Any:
        if isinstance(value, (tuple, frozenset)):
            rigid = isinstance(value, frozenset) or not _is_tuple(value)
            parts = self._changed(list(value), rigid)
            if parts is None:
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, types.MethodType):
            with self._fixed(rigid=True):
                owner = self(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return self._function(value) if value.__closure__ else value
        if isinstance(value, functools.partial):
            with self._fixed(rigid=True):
                function, keywords = self(value.func), self._items(value.keywords)
                arguments = [self(argument) for argument in value.args]
            return functools.partial(function, *arguments, **keywords)
        if self._copies and id(value) not in self._shared and is_copyable_object(value):
            return value if self._is_opaque(value) else self._object(value)
        return value

    def _changed(self, parts: list[Any], rigid: bool = True) -> list[Any] | None:
        """The parts translated; `None` if they all stay."""
        with self._fixed(rigid):
            new = [self(part) for part in parts]
        return None if all(a is b for a, b in zip(new, parts, strict=True)) else new

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """Function with the same code and a closure over the copy's parts."""
        parts = self._changed(closed_over(value))
        if parts is None:
            return value
        new = types.FunctionType(
            value.__code__,
            value.__globals__,
            value.__name__,
            value.__defaults__,
            tuple(types.CellType(part) for part in parts),
        )
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        return new

    def _array(self, value: Any) -> Any:
        known = self.holdings.get(id(value))
        if known is not None:
            return known.copied
        if value.nbytes > _MOST_BYTES or value.dtype.hasobject:
            return value
        new = value.copy()
        self.holdings[id(value)] = Holding(value, new, value.copy(), None, self.where)
        return new

    def _container(self, value: Any) -> Any:
        """A copy of a mutable container, the same one for every reference to it."""
        known = self.holdings.get(id(value))
        if known is not None:
            return known.copied
        new = self._empty_like(value) if len(value) <= MAX_CONTAINER else None
        if new is None:
            return value
        holding = self.holdings[id(value)] = Holding(value, new, None, None, self.where)
        if isinstance(value, dict):
            flat = len(value) > LONG_DICT and _is_flat(value.values())
            dict.update(new, value if flat else self._items(value))
        elif isinstance(value, set):
            with self._fixed(rigid=True):
                new.update(self(part) for part in value)
        elif len(value) > _LONG_LIST and _is_flat(value):
            new.extend(value)
        else:
            new.extend(self._entries(value))
        snapshot = dict if isinstance(value, dict) else list
        holding.before, holding.was = snapshot(new), snapshot(value)
        return new

    def _empty_like(self, value: Any) -> Any:
        """An empty container of the same kind; `None` if we do not know how to make one."""
        if isinstance(value, deque):
            return type(value)(maxlen=value.maxlen)
        factory = getattr(value, "default_factory", None)
        if self._tracks and (factory is int or factory is float):
            factory = functools.partial(track, factory(), self.sites)
        try:
            new = type(value)() if factory is None else type(value)(factory)
        except Exception:  # a class of the user's own, with an `__init__` of its own
            return None
        if len(new):
            return None
        if hasattr(value, "__dict__"):
            vars(new).update(vars(value))
        return new

    def _items(self, value: dict[Any, Any]) -> dict[Any, Any]:
        items = {}
        for key, part in value.items():
            if type(part) is int or type(part) is float:  # most often, and leads to no name
                items[key] = track(part, self.sites) if self._tracks else part
            else:
                items[key] = self._at(f"[{key!r}]", part)
        return items

    def _entries(self, value: Iterable[Any]) -> Iterator[Any]:
        for index, part in enumerate(value):
            yield self._at(f"[{index}]", part)

    def _object(self, value: Any) -> Any:
        """A copy of an object that holds plain data only; else the object itself."""
        known = self.holdings.get(id(value))
        if known is not None:
            return known.copied
        new = new_object(value)
        before = dict(self.holdings)
        holding = self.holdings[id(value)] = Holding(value, new, None, None, self.where)
        self._within.append(id(value))
        try:
            if len(self._within) > 1 and len(self.holdings) > _MOST_OBJECTS:
                raise NotPlainError
            holding.was = state_of(value)
            holding.before = {key: self._plain(key, part) for key, part in holding.was.items()}
        except NotPlainError:
            self.holdings = before
            self._shared[id(value)] = value  # kept alive, so that its id stays its own
            if len(self._within) > 1:
                raise
            return value
        finally:
            self._within.pop()
        for key, part in holding.before.items():
            object.__setattr__(new, key, part)
        return new

    def _plain(self, name: str, value: Any) -> Any:
        """Copy of the value of an attribute."""
        new = self._at(f".{name}", value)
        if not _is_data(value, 0) and new is value:
            raise NotPlainError
        return new


def _is_data(value: Any, depth: int) -> bool:
    """Return whether `value` is immutable or plain data, so that copies are interchangeable."""
    if isinstance(value, (*ATOMS, Tensor, *generators.KINDS)):
        return True
    if isinstance(value, (tuple, frozenset)) and depth < 3:
        return all(_is_data(part, depth + 1) for part in value)
    return False


def _is_tuple(value: Any) -> bool:
    return type(value) is tuple or hasattr(value, "_fields")


def _is_flat(value: Iterable[Any]) -> bool:
    """Return whether no entry is or refers to a part of the module; fast for lists of tensors."""
    return all(kind is Tensor or kind in ATOMS for kind in set(map(type, value)))
