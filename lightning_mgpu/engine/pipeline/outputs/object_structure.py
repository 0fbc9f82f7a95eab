"""Structure of outputs: containers, and objects with tensors such as key-value caches."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_mgpu.engine.batch.containers import (
    attributes_of,
    holds_tensors,
    is_container,
    parts,
    rebuild,
)


def inner(value: Any, path: str) -> list[tuple[str, Any]] | None:
    """Parts of a container or object with their paths; `None` if it is a leaf."""
    if is_container(value):
        return [(path + name, part) for name, part in parts(value)]
    if _is_record(value):
        return [(f"{path}.{name}", part) for name, part in attributes_of(value).items()]
    return None


def refilled(value: Any, new: list[Any]) -> Any:
    """Object of the same structure with other parts, in the order of `inner`."""
    if is_container(value):
        return rebuild(value, new)
    made = copy.copy(value)
    for name, part in zip(attributes_of(value), new, strict=True):
        object.__setattr__(made, name, part)
    return made


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with its path."""
    below = inner(value, path)
    if below is None:
        yield path, value
    for name, part in below or ():
        yield from leaves(part, name)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with `function` applied to every leaf, in the order of `leaves`."""
    below = inner(value, "")
    if below is None:
        return function(value)
    return refilled(value, [map_leaves(function, part) for _, part in below])


def _is_record(value: Any) -> bool:
    """Return whether `value` is an object with tensors among its attributes."""
    if isinstance(value, (type, nn.Module, set, frozenset)) or hasattr(value, "__torch_function__"):
        return False
    return bool(attributes_of(value)) and holds_tensors(value)
