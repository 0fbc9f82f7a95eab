"""What can be reached from a module, and structural copies of it.

Unlike a deep copy, a structural copy has modules and containers of its own, while all else (data,
loggers, functions) stays shared, needs no pickling, and parameters may alias the original's.
"""

import functools
import numbers
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__: list[str] = []

# Longer containers are shared rather than copied at every step.
MAX_CONTAINER = 100_000

_ATOMS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, type(None), type, np.ndarray, np.generic),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, numbers.Number),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, *weakref.ProxyTypes, weakref.ref),
)
_OPAQUE = (torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader)
_LIBRARIES = ("torch", "lightning", "torchmetrics", "numpy", "builtins", "functools", "collections")


class Structure:
    """The parts of a module that a copy needs for itself, and where they are referred to.

    Args:
        root: The module.
        is_unit: Which objects are to be replaced as a whole (metrics, say), their parts unseen.
        is_opaque: Which objects are to be shared, however much they refer to.
        ignore: Attributes of modules to pass over.

    Attributes:
        modules: All modules, `root` first.
        objects: Other objects of a user's classes that refer to modules or parameters.
        parameters: All parameters, each once.
        units: All units, each once.
        places: Every ``holder[key]`` that is or directly contains one of the above; holders are
            dicts (also those of attributes) and lists.
    """

    def __init__(
        self,
        root: nn.Module,
        is_unit: Callable[[Any], bool] = lambda _: False,
        is_opaque: Callable[[Any], bool] = lambda _: False,
        ignore: Iterable[str] = (),
    ) -> None:
        self.modules: list[nn.Module] = []
        self.objects: list[Any] = []
        self.parameters: list[nn.Parameter] = []
        self.units: list[Any] = []
        self.places: list[tuple[Any, Any, Any]] = []
        self._is_unit = is_unit
        self._is_opaque = is_opaque
        self._ignore = frozenset(ignore)
        self._linked: dict[int, bool] = {}
        self._keep: list[Any] = []  # an id means something only as long as its object lives
        self._visit(root)

    def _visit(self, value: Any) -> bool:
        """Whether `value` is, or leads to, one of our parts."""
        if type(value) in _ATOMS or isinstance(value, _ATOMS):
            return False
        if id(value) in self._linked:
            return self._linked[id(value)]
        self._keep.append(value)
        self._linked[id(value)] = isinstance(value, nn.Module)  # for those who refer to themselves
        self._linked[id(value)] = linked = self._visit_new(value)
        return linked

    def _visit_new(self, value: Any) -> bool:
        if isinstance(value, nn.Parameter):
            self.parameters.append(value)
            return True
        if isinstance(value, Tensor) or self._is_opaque(value) or isinstance(value, _OPAQUE):
            return False
        if self._is_unit(value):
            self.units.append(value)
            return True
        if isinstance(value, nn.Module):
            self.modules.append(value)
            self._visit_entries(vars(value), self._ignore)
            return True
        if isinstance(value, (dict, list, deque)):
            return len(value) <= MAX_CONTAINER and self._visit_entries(value)
        if isinstance(value, (tuple, set, frozenset)):
            return len(value) <= MAX_CONTAINER and any([self._visit(part) for part in value])
        if isinstance(value, types.MethodType):
            return self._visit(value.__self__)
        if isinstance(value, functools.partial):
            return any([self._visit(p) for p in (value.func, *value.args, value.keywords)])
        return self._visit_object(value)

    def _visit_object(self, value: Any) -> bool:
        library = type(value).__module__.partition(".")[0] in _LIBRARIES
        if library or not hasattr(value, "__dict__") or not self._visit_entries(vars(value)):
            return False
        self.objects.append(value)
        return True

    def _visit_entries(self, holder: Any, ignore: frozenset[str] = frozenset()) -> bool:
        linked = False
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in list(items):
            if (not ignore or key not in ignore) and self._visit(value):
                self.places.append((holder, key, value))
                linked = True
        return linked


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
        if type(value) in _ATOMS:
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
    return all(kind is Tensor or kind in _ATOMS for kind in set(map(type, value)))


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
