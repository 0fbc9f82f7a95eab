"""Replica 0: the user's own module, patched while a step lasts."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_mgpu._compat.torch_modules import (
    COMPILED_CALL,
    children_of,
    compiled_call,
    parameters_of,
)
from lightning_mgpu.engine import recurrent
from lightning_mgpu.engine.data_parallel.copying.replica import Replica
from lightning_mgpu.engine.data_parallel.copying.structure import Structure
from lightning_mgpu.engine.entry_swap import EntrySwap


class Master(Replica):
    """The user's module. In a step leaves stand in for its parameters, and copies for its units."""

    def __init__(self, structure: Structure, *args: Any) -> None:
        super().__init__(structure, *args)
        self.module = structure.modules[0]
        self._parts = [_parts(module) for module in structure.modules]
        patches = [*self._stand_ins(), *_uncompiled(structure.modules)]
        for module in structure.modules:
            patches += recurrent.stand_ins(module, self.remap)
        self._patches = EntrySwap(patches)
        self.overrides: Mapping[str, Any] = {}

    def is_stale(self) -> bool:
        """Return whether modules or parameters have been replaced since the copy."""
        return any(
            _parts(module) != parts
            for module, parts in zip(self.structure.modules, self._parts, strict=True)
        )

    @override
    def refresh(self) -> None:
        self.leaves.refresh()

    @override
    @contextmanager
    def entered(self, overrides: Mapping[str, Any]) -> Iterator[None]:
        self._enter(overrides)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def left(self) -> Iterator[None]:
        overrides = self.overrides
        self._leave()
        try:
            yield
        finally:
            self._enter(overrides)

    def _enter(self, overrides: Mapping[str, Any]) -> None:
        self.overrides = overrides
        self._patches.apply()
        vars(self.module).update(overrides)
        self.recorder.attach()

    def _leave(self) -> None:
        self.recorder.detach()
        self.leaves.keep_freezing()
        for key in self.overrides:
            vars(self.module).pop(key, None)
        self._patches.revert()

    def _stand_ins(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        for holder, key, value in self.structure.places:
            # Containers are places' holders themselves, and modules stay.
            is_left = isinstance(value, (nn.Module, list, dict, deque))
            if not is_left or id(value) in self.remap.memo:
                new = self.remap(value)
                if new is not value:
                    yield holder, key, value, new


def _uncompiled(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Modules compiled in place run as they are written, as their copies do."""
    for module in modules:
        call = compiled_call(module)
        if call is not None:
            yield vars(module), COMPILED_CALL, call, None


def _parts(module: nn.Module) -> list[Any]:
    """Identity of a module's parts: its class (parametrizations change it) and children by name."""
    parameters, modules = parameters_of(module), children_of(module)
    return [
        type(module),
        *parameters,
        *map(id, parameters.values()),
        *modules,
        *map(id, modules.values()),
        id(recurrent.list_of_weights(module)),
    ]
