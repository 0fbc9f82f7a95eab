"""The other replicas: structural copies, brought up to date before each step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.replication.buffers import Buffers
from lightning_mgpu.engine.replication.compiled import (
    COMPILED_ATTRIBUTES,
    compile_again,
    is_compiled,
)
from lightning_mgpu.engine.replication.remap import Remap, equal, merge_containers
from lightning_mgpu.engine.replication.replica import Replica
from lightning_mgpu.engine.replication.structure import Structure

__all__: list[str] = []

_MISSING = object()
_HOOKS = frozenset(
    key for key, value in vars(nn.Module()).items() if "hooks" in key and isinstance(value, dict)
)
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"}) | _HOOKS


class Copy(Replica):
    """A copy of the master on another slot."""

    def __init__(self, structure: Structure, memo: dict[int, Any], *args: Any) -> None:
        super().__init__(structure, memo, *args)
        for original in (*structure.modules, *structure.objects):
            kind: Any = type(original)
            memo[id(original)] = kind.__new__(kind)
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
            self.remap.where = type(original).__name__
            state = vars(original)
            _update_attributes(state, vars(copied), self.remap, skip, self.own_attributes)

    def merge(self) -> set[str]:
        """Bring what the step has put into containers to the master.

        Returns:
            What the step has written here and not there: attributes, containers and buffers.
        """
        lost = {*merge_containers(self.remap), *self._buffers.lost()}
        for (original, copied), before in zip(self._watched, self._before, strict=True):
            for key, value in vars(copied).items():
                if value is before.get(key, _MISSING) or key in self.own_attributes:
                    continue
                if key not in _PARTS and not equal(value, vars(original).get(key)):
                    lost.add(f"{type(original).__name__}.{key}")
        return lost


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
            copied[key] = value if key in shared else remap.at(key, value)
    if len(copied) > len(original):
        for key in copied.keys() - original.keys():
            del copied[key]


def _remapped(holder: Mapping[Any, Any], remap: Remap) -> dict[Any, Any]:
    return {key: remap(value) for key, value in holder.items()}
