"""Record, restore and compare everything that modules hold beside their parameters."""

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import (
    BLANK,
    WEIGHTS,
    buffers_of,
    forward_hook_tables,
    forward_hooks_of,
)
from lightning_mgpu.engine.compare import compare

_MISSING = object()
_DEPTH = 4
# Larger tensors and longer lists are data rather than state.
_MAX_BYTES, _MAX_ENTRIES = 2**28, 1000
# Objects of these packages are taken for parts of the machinery, not of the model.
_FOREIGN = ("torch.", "lightning.", "pytorch_lightning.", "lightning_mgpu.", "numpy.", "builtins.")
_OWN = BLANK | {WEIGHTS}


class ModuleSnapshot:
    """Snapshot of modules: attributes, buffers, and the objects these and hooks refer to.

    Args:
        modules: By name; without those they contain.
        since: An earlier record; what is as it was then is not copied again.
    """

    def __init__(
        self, modules: dict[str, nn.Module], since: "ModuleSnapshot | None" = None
    ) -> None:
        self._modules = modules
        self._since = since
        self._seen: dict[int, Any] = {}
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        self.leaves: dict[str, tuple[Any, bool]] = {}
        """By name: the value (of a tensor a copy), and whether it requires a gradient."""
        for name, module in modules.items():
            self._add_module(name, module)

    def restore(self, generators: bool = True) -> None:
        """Put everything back to what it was.

        Args:
            generators: Whether random number generators, too.
        """
        for container, kept in self._contents:
            _fill(container, kept)
        with torch.no_grad():
            for tensor, copy in self._tensors:
                if not _is_equal(tensor, copy):
                    tensor.data.copy_(copy)
        for put, state in self._generators if generators else ():
            put(state)

    def _add_module(self, path: str, module: nn.Module) -> None:
        state = vars(module)
        self._contents.append((state, dict(state)))
        buffers = buffers_of(module)
        self._contents.append((buffers, dict(buffers)))
        for of_kind in forward_hook_tables(module):  # (some libraries add hooks at the first call)
            self._contents.append((of_kind, of_kind.copy()))
        kind, where = type(module).__name__, f" (in `{path}`)" if path else ""
        for name, value in state.items():
            if name not in _OWN:
                self._add(f"{kind}.{name}", where, value)
        for name, buffer in buffers.items():
            self._add(f"{kind}.{name}", where, buffer)
        for hook in forward_hooks_of(module):
            for name, value in _kept_by(hook):
                if _is_container(value):
                    self._add(name, f" (kept by a hook of `{path or kind}`)", value)

    def _add(self, name: str, where: str, value: Any, depth: int = 0) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            self.leaves[f"`{name}`{where}"] = value, False
            return
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._add_tensor(f"`{name}`{where}", value)
            return
        if isinstance(value, nn.Module) or depth > _DEPTH:
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if self._add_generator(value):
            return
        if _is_container(value):
            self._contents.append((value, value.copy()))
        elif not isinstance(value, tuple):
            value = _state_of(value)
            if value is None:
                return
            self._contents.append((value, dict(value)))
        for inner, part in _entries(value):
            self._add(name + inner, where, part, depth + 1)

    def _add_tensor(self, title: str, value: Tensor) -> None:
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            return
        if value.nbytes > _MAX_BYTES:
            return
        earlier = self._since.leaves.get(title, (None, False))[0] if self._since else None
        copy = earlier if isinstance(earlier, Tensor) and _is_equal(value, earlier) else None
        copy = value.detach().clone() if copy is None else copy
        self.leaves[title] = copy, value.requires_grad
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            self._tensors.append((value, copy))

    def _add_generator(self, value: Any) -> bool:
        if isinstance(value, torch.Generator):
            self._generators.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._generators.append((value.setstate, value.getstate()))
        elif hasattr(value, "bit_generator"):
            bits = value.bit_generator
            self._generators.append((functools.partial(setattr, bits, "state"), bits.state))
        else:
            return False
        return True


def differing(
    one: ModuleSnapshot, other: ModuleSnapshot, coarse: torch.dtype | None = None
) -> Iterator[str]:
    """Names of the entries in which two snapshots differ.

    Args:
        one: A record.
        other: Another one.
        coarse: The least precise dtype that was computed in.
    """
    for title in {**one.leaves, **other.leaves}:
        a = one.leaves.get(title, (_MISSING, False))[0]
        b = other.leaves.get(title, (_MISSING, False))[0]
        if a is b:
            continue
        is_new = a is _MISSING or b is _MISSING or (a is None) != (b is None)
        if is_new or compare(a, b, computed_in=coarse):
            yield title


def _entries(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in islice(list(value.items()), _MAX_ENTRIES)]
    if isinstance(value, (set, frozenset)):
        return []
    return [(f"[{index}]", part) for index, part in enumerate(islice(value, _MAX_ENTRIES))]


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set, deque))


def _state_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that belongs to the model."""
    if isinstance(value, type) or callable(value):
        return None
    if f"{type(value).__module__}.".startswith(_FOREIGN):
        return None
    state = getattr(value, "__dict__", None)
    return state if isinstance(state, dict) else None


def _kept_by(function: Any) -> Iterator[tuple[str, Any]]:
    """Objects that a hook refers to beside its arguments, with their names."""
    if isinstance(function, functools.partial):
        for index, value in enumerate((*function.args, *function.keywords.values())):
            yield f"argument {index}", value
        function = function.func
    owner = getattr(function, "__self__", None)
    for name, value in (_state_of(owner) or {}).items() if owner is not None else ():
        yield f"{type(owner).__name__}.{name}", value
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        for name, value in (getattr(function, "__dict__", None) or {}).items():
            yield f"{type(function).__name__}.{name}", value
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name, value in zip(code.co_varnames, function.__defaults__ or (), strict=False):
        yield name, value
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _fill(container: Any, kept: Any) -> None:
    if isinstance(container, dict):
        for key in [key for key in container if key not in kept]:
            del container[key]
        for key, value in kept.items():
            if container.get(key, _MISSING) is not value:
                container[key] = value
        return
    if len(container) == len(kept) and all(a is b for a, b in zip(container, kept, strict=True)):
        return
    container.clear()
    if isinstance(container, set):
        container.update(kept)
    else:
        container.extend(kept)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one.detach(), other)
