"""The other replicas: structural copies, brought up to date before each step."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.buffers import Buffers
from lightning_mgpu.engine.compiled import COMPILED_ATTRIBUTES, compile_again, is_compiled
from lightning_mgpu.engine.remap import Remap
from lightning_mgpu.engine.replica import Replica
from lightning_mgpu.engine.structure import Structure

log = logging.getLogger(__name__)

__all__: list[str] = []

_MISSING = object()
_HOOKS = frozenset(
    key for key, value in vars(nn.Module()).items() if "hooks" in key and isinstance(value, dict)
)
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"}) | _HOOKS
_COMPARABLE = (bool, int, float, complex, str, bytes, type(None))


class Copy(Replica):
    """A copy of the master on another slot."""

    def __init__(self, structure: Structure, memo: dict[int, Any], *args: Any) -> None:
        super().__init__(structure, memo, *args)
        for original in (*structure.modules, *structure.objects):
            memo[id(original)] = object.__new__(type(original))
        self._pairs = [(m, memo[id(m)]) for m in (*structure.modules, *structure.objects)]
        self._buffers = Buffers(structure.modules, memo, self.device)
        for index, module in enumerate(structure.modules):
            _fill(module, memo[id(module)], self._buffers.holder(index), self.remap)
        self._update()
        for module in structure.modules:
            if is_compiled(module):
                compile_again(module, memo[id(module)], self.remap(module._orig_mod))
        self.module = memo[id(structure.modules[0])]
        self.recorder = Recorder([memo[id(x)] for x in self.recorder.layers])
        # Torch's own layers write no attributes in `forward`.
        self._watched = [
            (o, c) for o, c in self._pairs if not type(o).__module__.startswith("torch.")
        ]
        self._before: list[dict[str, Any]] = []

    @override
    def refresh(self) -> None:
        self.leaves.refresh()
        self._buffers.refresh()
        self._update()
        if hasattr(self.module, "_device"):
            vars(self.module)["_device"] = self.device
        self._before = [dict(vars(copied)) for _, copied in self._watched]

    @override
    @contextmanager
    def entered(self, overrides: Mapping[str, Any]) -> Iterator[None]:
        vars(self.module).update(overrides)
        self.recorder.attach()
        try:
            yield
        finally:
            self.recorder.detach()
            for key in overrides:
                vars(self.module).pop(key, None)

    def _update(self) -> None:
        self.remap.begin()
        for original, copied in self._pairs:
            skip = _PARTS | COMPILED_ATTRIBUTES if is_compiled(original) else _PARTS
            state = vars(original)
            _update_attributes(state, vars(copied), self.remap, skip, self.own_attributes)

    def report_lost_writes(self, warned: set[tuple[type, str]]) -> None:
        """Warn, once, of attributes that this slot's task has set to other values than slot 0's."""
        for (original, copied), before in zip(self._watched, self._before, strict=True):
            for key, value in vars(copied).items():
                if value is before.get(key, _MISSING) or key in self.own_attributes:
                    continue
                where = (type(original), key)
                if where in warned or key in _PARTS or _equal(value, vars(original).get(key)):
                    continue
                warned.add(where)
                log.warning(
                    "The step sets `%s.%s` to another value on each replica; replica 0's is kept."
                    " Log it with `self.log`, append it to a list or return it to have them all.",
                    type(original).__name__,
                    key,
                )


def _fill(
    original: nn.Module, copied: nn.Module, buffers: dict[str, Tensor | None], remap: Remap
) -> None:
    """Give a blank copy its parts."""
    state = vars(copied)
    state["_parameters"] = _remapped(original._parameters, remap)
    state["_buffers"] = buffers
    state["_modules"] = _remapped(original._modules, remap)
    state["_compiled_call_impl"] = None
    state.update({key: type(vars(original)[key])() for key in _HOOKS})


def _update_attributes(
    original: dict[str, Any],
    copied: dict[str, Any],
    remap: Remap,
    skip: frozenset[str],
    shared: frozenset[str],
) -> None:
    """Bring a copy's attributes, hooks among them, up to date.

    Args:
        original: The attributes of the original.
        copied: Those of its copy.
        remap: From the one's parts to the other's.
        skip: Attributes that the copy has of its own.
        shared: Attributes to be taken over as they are.
    """
    for key, value in original.items():
        if copied.get(key, _MISSING) is value:
            continue
        if key in _HOOKS:
            if value or copied[key]:
                copied[key].clear()
                copied[key].update(_remapped(value, remap))
        elif key not in skip:
            copied[key] = value if key in shared else remap(value)
    if len(copied) > len(original):
        for key in copied.keys() - original.keys():
            del copied[key]


def _remapped(holder: Mapping[Any, Any], remap: Remap) -> dict[Any, Any]:
    return {key: remap(value) for key, value in holder.items()}


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _COMPARABLE) and a == b)
