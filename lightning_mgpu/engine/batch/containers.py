"""The structures that batches and outputs are made of.

A container is any nesting of mappings, sequences, named tuples, dataclasses and attrs classes.
Everything else is a leaf.
"""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch.graphs import is_graph_batch

_DEEPEST_OBJECT = 3


def is_sequence(value: Any) -> bool:
    """Return whether `value` is a list or tuple without named entries (`torch.Size` is a leaf)."""
    return (
        isinstance(value, (list, tuple, deque))
        and not isinstance(value, (PackedSequence, torch.Size))
        and not hasattr(value, "_fields")
    )


def is_container(value: Any) -> bool:
    """Return whether `value` is a container, whose parts are handled one by one."""
    if isinstance(value, (Tensor, PackedSequence, torch.Size)) or is_tensor_like(value):
        return False
    return isinstance(value, (Mapping, list, tuple, deque)) or _fields(value) is not None


def is_tensor_like(value: Any) -> bool:
    """Return whether `value` acts as a tensor under torch's functions, like a `TensorDict`."""
    kind = type(value)
    return hasattr(kind, "__torch_function__") and hasattr(kind, "shape") and kind is not Tensor


def is_array(value: Any) -> bool:
    """Return whether `value` has a first dimension: a tensor, tensor-like or NumPy-like array."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    if isinstance(value, (PackedSequence, torch.Size)):
        return False
    if is_tensor_like(value) or hasattr(value, "__array__"):
        return len(getattr(value, "shape", ())) > 0
    return False


def has_rows(value: Any) -> bool:
    """Return whether `value` is a leaf made of samples: an array or a graph batch."""
    return is_array(value) or is_graph_batch(value)


def parts(value: Any) -> list[tuple[str, Any]]:
    """Parts of a container with their access paths (`"['x']"`, `".x"`); empty for a leaf."""
    if not is_container(value):
        return []
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple, deque)):
        names = getattr(value, "_fields", None)
        if names is not None:
            return [(f".{name}", part) for name, part in zip(names, value, strict=True)]
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    return [(f".{name}", getattr(value, name)) for name in _fields(value) or ()]


def rebuild(example: Any, new: list[Any]) -> Any:
    """A container like the example, with other parts, in the order of `parts`."""
    if isinstance(example, Mapping):
        return _rebuild_mapping(example, dict(zip(example, new, strict=True)))
    if isinstance(example, deque):
        return type(example)(new, maxlen=example.maxlen)
    if isinstance(example, (list, tuple)):
        return type(example)(*new) if hasattr(example, "_fields") else type(example)(new)
    return _rebuild_record(example, dict(zip(_fields(example) or (), new, strict=True)))


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with `function` applied to every leaf."""
    if not is_container(value):
        return function(value)
    return rebuild(value, [map_leaves(function, part) for _, part in parts(value)])


def leaves(value: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every leaf, each with how to get there."""
    if not is_container(value):
        yield path, value
    for name, part in parts(value):
        yield from leaves(part, path + name)


def sequences(value: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every list and tuple whose entries have no names, each with how to get there."""
    if is_sequence(value):
        yield path, value
    for name, part in parts(value):
        yield from sequences(part, path + name)


def holds_tensors(value: Any, depth: int = _DEEPEST_OBJECT) -> bool:
    """Return whether a leaf that is no tensor holds tensors in its attributes, at any depth."""
    if isinstance(value, (Tensor, PackedSequence)):
        return True
    if isinstance(value, (set, frozenset)):
        return any(isinstance(entry, Tensor) for entry in value)
    attributes = attributes_of(value)
    if not attributes or depth == 0 or isinstance(value, type):
        return False
    return any(
        holds_tensors(leaf, depth - 1) for part in attributes.values() for _, leaf in leaves(part)
    )


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object of a user's class."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _fields(value: Any) -> tuple[str, ...] | None:
    """The names of a dataclass's or attrs class's fields."""
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        return tuple(field.name for field in dataclasses.fields(value))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    return None


def _rebuild_mapping(example: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    kind: Any = type(example)
    if kind is dict:
        return new
    try:
        return kind(**new) if hasattr(kind, "__dataclass_fields__") else kind(new)
    except TypeError:  # such as a `defaultdict`, which is made from a function
        copied: Any = copy.copy(example)
        for key, part in new.items():
            copied[key] = part
        return copied


def keeps_derived(value: Any) -> bool:
    """Return whether parts of a record would keep values computed from the whole."""
    names = _fields(value) if not isinstance(value, (Mapping, list, tuple, deque)) else None
    if names is None or not _derives(value):
        return False
    derived = (attributes_of(value).keys() - set(names)) | (set(names) - _arguments(value).keys())
    return (
        bool(derived)
        and _constructed(value, {name: getattr(value, name) for name in names}) is None
    )


def _rebuild_record(example: Any, new: dict[str, Any]) -> Any:
    if _derives(example):
        made = _constructed(example, new)
        if made is not None:
            return made
    copied = copy.copy(example)
    for name, part in new.items():
        object.__setattr__(copied, name, part)  # it may be frozen
    return copied


def _derives(example: Any) -> bool:
    """Return whether a record's class computes something from its fields when constructed."""
    return hasattr(example, "__post_init__") or hasattr(example, "__attrs_post_init__")


def _constructed(example: Any, new: dict[str, Any]) -> Any:
    """A new record from `new`; `None` if its making would change the fields once more."""
    names = _arguments(example)
    kind: Any = type(example)
    try:
        again = kind(**{given: getattr(example, name) for name, given in names.items()})
        if any(getattr(again, name) is not getattr(example, name) for name in names):
            return None
        return kind(**{given: new[name] for name, given in names.items()})
    except Exception:  # an `__init__` with other arguments, or checks that a part does not pass
        return None


def _arguments(example: Any) -> dict[str, str]:
    """The fields that a record is made from, and what `__init__` calls them."""
    kind = type(example)
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name: field.name for field in dataclasses.fields(example) if field.init}
    return {a.name: getattr(a, "alias", a.name) for a in kind.__attrs_attrs__ if a.init}
