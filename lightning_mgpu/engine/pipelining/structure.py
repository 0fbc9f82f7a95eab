"""Outputs taken apart: containers, and objects with tensors, such as caches of keys and values."""

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

__all__: list[str] = []


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf, each with how to get there."""
    if is_container(value):
        for name, part in parts(value):
            yield from leaves(part, path + name)
    elif _is_record(value):
        for name, part in attributes_of(value).items():
            yield from leaves(part, f"{path}.{name}")
    else:
        yield path, value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with `function` applied to every leaf, in the order of `leaves`."""
    if is_container(value):
        return rebuild(value, [map_leaves(function, part) for _, part in parts(value)])
    if not _is_record(value):
        return function(value)
    made = copy.copy(value)
    for name, part in attributes_of(value).items():
        object.__setattr__(made, name, map_leaves(function, part))
    return made


def _is_record(value: Any) -> bool:
    """Whether it is an object of some class that has tensors among its attributes."""
    if isinstance(value, (type, nn.Module, set, frozenset)) or hasattr(value, "__torch_function__"):
        return False
    return bool(attributes_of(value)) and holds_tensors(value)
