"""References to a module's parts, translated to those of a structural copy."""

import functools
import types
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.replication.structure import ATOMS, MAX_CONTAINER, closed_over

__all__: list[str] = []

_COMPARABLE = (bool, int, float, complex, str, bytes, type(None))


class Remap:
    """Translates references from the original's parts to a copy's.

    Args:
        memo: The copies, by the `id` of their originals, which must outlive this.
        copies_containers: Whether lists, dicts and the like are copied, each once a step, so that
            what a task puts into them is its own.

    Attributes:
        where: What is being translated, in words.
        containers: This step's, by the ids of the originals: the original, its copy, the copy's
            content when it was made, and where it was found.
    """

    def __init__(self, memo: dict[int, Any], copies_containers: bool = True) -> None:
        self.memo = memo
        self.where = ""
        self.containers: dict[int, tuple[Any, Any, Any, str]] = {}
        self._copies_containers = copies_containers

    def begin(self) -> None:
        """Forget the containers of the last step."""
        self.containers = {}

    def __call__(self, value: Any) -> Any:
        """What the copy has in place of `value`: itself, if it leads to no part."""
        if type(value) in ATOMS:
            return value
        copied = self.memo.get(id(value))
        if copied is not None:
            return copied
        if isinstance(value, (list, dict, deque, set)):
            return self._container(value) if self._copies_containers else value
        if isinstance(value, (tuple, frozenset)):
            parts = self._changed(list(value))
            if parts is None:
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, types.MethodType):
            owner = self.memo.get(id(value.__self__))
            return value if owner is None else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            return self._function(value) if value.__closure__ else value
        if isinstance(value, functools.partial):
            return functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        return value

    def at(self, name: str, value: Any) -> Any:
        """Translate the attribute `name` of what `where` says."""
        owner, self.where = self.where, f"{self.where}.{name}"
        try:
            return self(value)
        finally:
            self.where = owner

    def _changed(self, parts: list[Any]) -> list[Any] | None:
        """The parts translated; `None` if they all stay."""
        new = [self(part) for part in parts]
        return None if all(a is b for a, b in zip(new, parts, strict=True)) else new

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """The same code over the copy's parts, where its closure has any."""
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

    def _container(self, value: Any) -> Any:
        """A copy of a mutable container, the same one for every reference to it."""
        known = self.containers.get(id(value))
        if known is not None:
            return known[1]
        new = _empty_like(value) if len(value) <= MAX_CONTAINER else None
        if new is None:
            return value
        self.containers[id(value)] = (value, new, None, self.where)
        if isinstance(value, dict):
            dict.update(new, value if _is_flat(value.values()) else self._items(value))
        elif isinstance(value, set):
            new.update(self(part) for part in value)
        else:
            new.extend(value if _is_flat(value) else [self(part) for part in value])
        snapshot = dict(new) if isinstance(value, dict) else list(new)
        self.containers[id(value)] = (value, new, snapshot, self.where)
        return new

    def _items(self, value: dict[Any, Any]) -> dict[Any, Any]:
        return {key: self(part) for key, part in value.items()}


def merge_containers(remap: Remap) -> list[str]:
    """Add what a copy's task has put into its containers to the originals.

    That is: items appended to lists and deques, keys new to dicts and sets, and what a `Counter`
    has counted. Other changes of a copy are its own, and the original's stand.

    Returns:
        Where such other changes differ from the original's.
    """
    lost = []
    for original, new, snapshot, where in remap.containers.values():
        if isinstance(original, list):
            original.extend(new[len(snapshot) :])
            kept = len(new) >= len(snapshot)
        elif isinstance(original, deque):
            original.extend(_appended(snapshot, list(new)))
            kept = True
        elif isinstance(original, set):
            original.update(new.difference(snapshot))
            kept = True
        elif isinstance(original, Counter):
            for key in new:
                original[key] += new[key] - snapshot.get(key, 0)
            kept = True
        else:
            kept = _merge_dict(original, new, snapshot)
        if not kept:
            lost.append(where)
    return lost


def _merge_dict(original: dict[Any, Any], new: dict[Any, Any], snapshot: dict[Any, Any]) -> bool:
    """Add new keys; whether nothing else was changed that the original has otherwise."""
    kept = True
    for key, value in new.items():
        if key in snapshot:
            kept = kept and (value is snapshot[key] or equal(value, original.get(key)))
        elif key not in original:
            dict.__setitem__(original, key, value)
        elif isinstance(value, list) and isinstance(original[key], list):
            original[key].extend(value)  # every copy began this list, like a `defaultdict(list)`
        else:
            kept = kept and equal(value, original[key])
    return kept


def equal(a: Any, b: Any) -> bool:
    """Whether two values are plainly the same, without comparing tensors or a user's objects."""
    return a is b or (type(a) is type(b) and isinstance(a, _COMPARABLE) and a == b)


def _appended(before: list[Any], after: list[Any]) -> list[Any]:
    """The items that a deque, which may have dropped as many at its head, has gained."""
    for dropped in range(len(before) + 1):
        kept = before[dropped:]
        if len(kept) <= len(after) and all(a is b for a, b in zip(kept, after, strict=False)):
            return after[len(kept) :]
    return []


def _is_flat(value: Iterable[Any]) -> bool:
    """Whether nothing in it can be, or lead to, a part; quick for long lists of tensors."""
    return all(kind is Tensor or kind in ATOMS for kind in set(map(type, value)))


def _empty_like(value: Any) -> Any:
    """An empty container of the same kind; `None` if we do not know how to make one."""
    if isinstance(value, deque):
        return type(value)(maxlen=value.maxlen)
    factory = getattr(value, "default_factory", None)
    try:
        new = type(value)() if factory is None else type(value)(factory)
    except Exception:  # a class of the user's own, with an `__init__` of its own
        return None
    if len(new):
        return None
    if hasattr(value, "__dict__"):
        vars(new).update(vars(value))
    return new
