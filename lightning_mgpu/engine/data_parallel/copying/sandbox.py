"""A copy of a module for one trial run, which leaves nothing behind."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import (
    BatchNorm,
    Dropout,
    buffers_of,
    is_compiled,
    original_of,
)
from lightning_mgpu.engine.batch.containers import rebuild
from lightning_mgpu.engine.data_parallel.copying import generators
from lightning_mgpu.engine.data_parallel.copying.containers import state_of
from lightning_mgpu.engine.data_parallel.copying.copies import Copy
from lightning_mgpu.engine.data_parallel.copying.isolation import Isolation

_NOISE = (Dropout, BatchNorm)


class Sandbox(Copy):
    """A copy with memory of its own: parameters, buffers, and all else that a step may write to.

    What other copies share with the master (tensors and objects among the attributes) is copied
    too; see `Isolation`.
    """

    def isolate(self, is_opaque: Callable[[Any], bool]) -> None:
        """Update from the master, and copy everything that is shared with it.

        Args:
            is_opaque: Objects that stay shared, however much they refer to.

        Raises:
            UnsafeError: It holds too much to be copied.
        """
        self.refresh()
        self.isolation = Isolation(self.remap.memo, is_opaque)
        for original, copied in self._pairs:
            own = self.own_attributes - {"_hparams"} if isinstance(original, nn.Module) else set()
            state, originals = vars(copied), vars(original)
            for key, value in list(state.items()):
                if key not in own and key in originals:
                    state[key] = self._isolated(value, originals[key])
        for holding in list(self.remap.holdings.values()):
            copied, originals = holding.copied, dict(_entries(holding.original))
            for key, value in _entries(copied):
                new = self._isolated(value, originals.get(key))
                if isinstance(copied, (dict, list, deque)):
                    copied[key] = new
                else:
                    object.__setattr__(copied, key, new)

    def _isolated(self, value: Any, original: Any) -> Any:
        """Return a value, or its isolated copy if it is the original's."""
        if value is original or isinstance(original, generators.KINDS):
            return self.isolation(original)
        if isinstance(value, tuple):
            return rebuild(value, list(map(self._isolated, value, original)))
        return value

    @property
    def modules(self) -> list[nn.Module]:
        """The copies of all modules, the root first."""
        return [copied for _, copied in self._pairs if isinstance(copied, nn.Module)]

    def calm(self, everything: bool) -> None:
        """Put modules that draw random numbers or mix samples into evaluation mode.

        Args:
            everything: All modules rather than torch's dropout and batch normalisation.
        """
        for module in self.modules:
            if everything or isinstance(module, _NOISE):
                module.training = False
            if is_compiled(module):
                # Compiled for the shapes of a trial, it would stay so.
                vars(module)["forward"] = original_of(module)

    @torch.no_grad()
    def to_double(self) -> None:
        """Compute in double precision."""
        for leaf in self.leaves.leaves:
            leaf.data = in_double(leaf.data)
        for module in self.modules:
            for holder in (buffers_of(module), vars(module)):
                for key, value in holder.items():
                    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                        holder[key] = in_double(value)


def in_double(value: Any) -> Any:
    """A floating-point tensor in double precision; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _entries(holder: Any) -> list[tuple[Any, Any]]:
    """Entries of a container or plain object, by index, key or attribute name."""
    if isinstance(holder, dict):
        return list(dict.items(holder))
    if isinstance(holder, (list, deque)):
        return list(enumerate(holder))
    return [] if isinstance(holder, (set, np.ndarray)) else list(state_of(holder).items())
