"""Compute with leaves that alias a module's parameters, so that the parameters see one gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.leaves import Leaves
from lightning_mgpu.engine.patches import Patches

__all__: list[str] = []


class Shadow:
    """Leaves in place of the parameters of some modules, for as long as a step lasts.

    Args:
        modules: Modules, with all that they contain.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._holders = list({id(m): m for module in modules for m in module.modules()}.values())
        self.parameters = list(
            {
                id(p): p for m in self._holders for p in m._parameters.values() if p is not None
            }.values()
        )
        # Leaves alias the parameters wherever those lie; the device is of no account.
        self._leaves = Leaves(self.parameters, torch.device("cpu"), own_memory=False)
        self._patches = Patches(self._find())

    def is_stale(self) -> bool:
        """Whether modules or parameters are no longer those that were found."""
        return self._patches.is_stale()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The modules compute with the leaves."""
        self._leaves.refresh()
        self._patches.apply()
        try:
            yield
        finally:
            self._patches.revert()

    def take_gradients(self) -> list[Tensor | None]:
        """What has been accumulated for each parameter since the last time."""
        return self._leaves.take_gradients()

    def _find(self) -> list[tuple[Any, str, Any, Any]]:
        leaf_of = dict(zip(map(id, self.parameters), self._leaves.leaves, strict=True))
        patches: list[tuple[Any, str, Any, Any]] = []
        for module in self._holders:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    patches.append((module._parameters, name, parameter, leaf_of[id(parameter)]))
            flat = vars(module).get("_flat_weights")  # recurrent layers keep a list of their own
            if isinstance(flat, list):
                leaves = [leaf_of.get(id(weight), weight) for weight in flat]
                patches.append((vars(module), "_flat_weights", flat, leaves))
        return patches
