"""Detect writes to variables outside of the model, which all replicas share.

Only what the functions of the model's classes and of its hooks name can be seen: variables of their
modules and of the functions around them. They are looked at in the first steps.
"""

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_mgpu._compat.torch import version_of
from lightning_mgpu.engine.data_parallel.copying.structure import Structure

_CONTAINERS = (dict, list, set, deque)
_LIBRARIES = ("torch", "lightning", "torchmetrics", "numpy", "builtins")
_FIRST_STEPS = 3
_MOST_ENTRIES = 1000
_NOTHING = object()


class SharedVariables:
    """Detect writes to the outside variables of one model.

    Args:
        structure: The model's parts.
    """

    def __init__(self, structure: Structure) -> None:
        self._places: dict[tuple[int, str], tuple[Any, str]] = {}
        self._kinds: dict[str, int] = {}
        self._before: dict[tuple[int, str], Any] = {}
        self._grown: set[tuple[int, str]] = set()
        self._seen: set[int] = set()
        for kind in {type(value) for value in (*structure.modules, *structure.objects)}:
            self._look_into_class(kind)
        for module in structure.modules:
            for name, hooks in vars(module).items():
                if "hooks" in name and isinstance(hooks, dict):
                    self._look_into(hooks.values(), depth=1)

    def begin(self, kind: str) -> None:
        """Start a step."""
        number = self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._before = self._now() if number <= _FIRST_STEPS else {}

    def written(self) -> list[str]:
        """The names of the variables that have changed since."""
        if not self._before:
            return []
        now = self._now()
        names = set()
        for key, before in self._before.items():
            after = now.get(key, [])
            if _same(before, after):
                continue
            if _has_grown(before, after) and key not in self._grown:
                self._grown.add(key)  # a cache gains keys once
                continue
            names.add(self._places[key][1])
        return sorted(names)

    def _now(self) -> dict[tuple[int, str], Any]:
        return {key: _content(_value(holder, key[1])) for key, (holder, _) in self._places.items()}

    def _look_into_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] not in _LIBRARIES:
                self._look_into(vars(base).values(), depth=1)

    def _look_into(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            for function in _functions(value):
                if id(function) not in self._seen:
                    self._seen.add(id(function))
                    self._look_into_function(function, depth)

    def _look_into_function(self, function: types.FunctionType, depth: int) -> None:
        if function.__module__ and function.__module__.partition(".")[0] in _LIBRARIES:
            return
        variables = function.__globals__
        called = []
        for name in _names(function.__code__):
            value = variables.get(name, _NOTHING)
            if isinstance(value, types.FunctionType) and depth:
                called.append(value)
            elif _is_variable(value):
                self._places[id(variables), name] = variables, name
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if _is_variable(_value(cell, name)):
                self._places[id(cell), name] = cell, name
        self._look_into(called, depth - 1)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    if isinstance(value, property):
        yield from _functions(value.fget)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif isinstance(value, types.FunctionType):
        yield getattr(value, "__wrapped__", value)


def _names(code: types.CodeType) -> set[str]:
    """The names that a function, and those defined in it, look up outside."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _is_variable(value: Any) -> bool:
    """Return whether `value` may be a variable, rather than a class, module or function."""
    if isinstance(value, _CONTAINERS):
        return len(value) <= _MOST_ENTRIES
    return type(value) in (int, float, Tensor) and not isinstance(value, nn.Parameter)


def _value(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, _NOTHING)
    try:
        return holder.cell_contents
    except ValueError:
        return _NOTHING


def _content(value: Any) -> Any:
    """Content that a write would change, to compare by identity."""
    if isinstance(value, dict):
        return [value, *value.items()]
    if isinstance(value, _CONTAINERS):
        return [value, *value]
    if isinstance(value, Tensor):
        return [value, 0 if value.is_inference() else version_of(value)]
    return [value]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(_is_same, a, b))


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(map(_is_same, a, b))
    return a is b or (type(a) in (int, float) and type(b) is type(a) and bool(a == b))


def _has_grown(a: list[Any], b: list[Any]) -> bool:
    """Return whether a dict has gained keys and kept all others."""
    return bool(b) and isinstance(b[0], dict) and len(b) > len(a) and all(map(_is_same, a, b))
