"""References to a module's parts, translated to those of a structural copy."""

import functools
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_mgpu.engine.structure import ATOMS, MAX_CONTAINER

__all__: list[str] = []


class Remap:
    """Translates references from the original's parts to a copy's.

    Args:
        memo: The copies, by the `id` of their originals, which must outlive this.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        # This step's containers: (original, copy, the copy's content when it was made).
        self.containers: dict[int, tuple[Any, Any, Any]] = {}

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
            return self._container(value)
        if isinstance(value, (tuple, frozenset)):
            parts = [self(part) for part in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, types.MethodType):
            owner = self.memo.get(id(value.__self__))
            return value if owner is None else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            return functools.partial(self(value.func), *self(value.args), **self(value.keywords))
        return value

    def _container(self, value: Any) -> Any:
        """A copy of a mutable container, the same one for every reference to it."""
        known = self.containers.get(id(value))
        if known is not None:
            return known[1]
        if len(value) > MAX_CONTAINER:
            return value
        new = _empty_like(value)
        if new is None:
            return value
        self.containers[id(value)] = (value, new, None)
        if isinstance(value, dict):
            for key, part in value.items():
                dict.__setitem__(new, key, self(part))
        elif isinstance(value, set):
            new.update(self(part) for part in value)
        else:
            new.extend(value if _is_flat(value) else [self(part) for part in value])
        snapshot = len(new) if isinstance(value, list) else list(new)
        self.containers[id(value)] = (value, new, snapshot)
        return new


def merge_containers(remap: Remap) -> None:
    """Add what a copy's task has put into its containers to the originals.

    Items appended to lists and deques, and keys new to dicts and sets. Other changes of a copy are
    its own: the original's stand.
    """
    for original, new, snapshot in remap.containers.values():
        if isinstance(original, list):
            if len(new) > snapshot:
                original.extend(new[snapshot:])
        elif isinstance(original, deque):
            original.extend(_appended(snapshot, list(new)))
        elif isinstance(original, set):
            original.update(new - set(snapshot))
        elif len(new) > len(snapshot):
            _merge_keys(original, new, set(snapshot))


def _merge_keys(original: dict[Any, Any], new: dict[Any, Any], known: set[Any]) -> None:
    for key in [key for key in new if key not in known]:
        value = new[key]
        if key not in original:
            dict.__setitem__(original, key, value)
        elif isinstance(value, list) and isinstance(original[key], list):
            original[key].extend(value)  # every copy began this list, like a `defaultdict(list)`


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
    return new if len(new) == 0 else None
