"""Containers and plain objects that are copied for each replica and step."""

import argparse
import collections
import enum
import sys
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

_STANDARD = (
    types.SimpleNamespace,
    argparse.Namespace,
    collections.UserDict,
    collections.UserList,
)
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy")
# A class that has one of these knows better than we do what a copy is, or is not to be copied.
_OWN_WAYS = ("__del__", "__reduce__", "__getstate__", "__deepcopy__", "__copy__")


@dataclass
class Holding:
    """A container, array or object of the master's and its copy on another replica.

    Attributes:
        original: The master's.
        copied: The replica's.
        before: What `copied` held at the start of the step.
        was: What `original` held then; `None` for arrays.
        where: Where it was found.
    """

    original: Any
    copied: Any
    before: Any
    was: Any
    where: str


def is_copyable_object(value: Any) -> bool:
    """Return whether `value` is of a Python class that keeps all its state in attributes."""
    kind: Any = type(value)
    if kind in _STANDARD:
        return True
    if isinstance(value, (type, enum.Enum, BaseException, nn.Module)):
        return False
    package = kind.__module__.partition(".")[0]
    if package in _LIBRARIES or (package in sys.stdlib_module_names and package != "__main__"):
        return False
    if kind.__new__ is not object.__new__ or not _has_state(value):
        return False
    return all(getattr(kind, name, None) is getattr(object, name, None) for name in _OWN_WAYS)


def new_object(value: Any) -> Any:
    """A blank object of the same class."""
    kind: Any = type(value)
    return kind.__new__(kind)


def state_of(value: Any) -> dict[str, Any]:
    """An object's attributes, those in slots among them."""
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _has_state(value: Any) -> bool:
    return bool(getattr(value, "__dict__", None)) or bool(_slots(type(value)))


def _slots(kind: type) -> list[str]:
    names = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return names
