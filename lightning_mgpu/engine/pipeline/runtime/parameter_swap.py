"""Replace parameters by aliasing leaves, so that the parameters get one gradient per step."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import parameters_of
from lightning_mgpu.engine import recurrent
from lightning_mgpu.engine.entry_swap import EntrySwap
from lightning_mgpu.engine.parameter_leaves import Leaves


class ParameterSwap:
    """Replace the parameters of some modules by leaves during a step.

    A parameter that several stages use lies with one of them. Each of the others has a leaf of its
    own, and on another device a copy of the values, so that stages do not wait for each other and
    gradients add up in a fixed order.

    Args:
        modules: Modules, with all that they contain.
        stage_of: The stage of each module, by its `id`; none if that of its parameters.
        owner: The stage of each parameter, by its `id`; none if the first.
        devices: The device of each stage.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        stage_of: Mapping[int, int],
        owner: Mapping[int, int],
        devices: Sequence[torch.device],
    ) -> None:
        self._holders = list({id(m): m for module in modules for m in module.modules()}.values())
        self.parameters = list(
            {
                id(p): p for m in self._holders for p in parameters_of(m).values() if p is not None
            }.values()
        )
        self._stage_of, self._owner, self._devices = stage_of, owner, devices
        # Leaves alias the parameters wherever those lie; the device is of no account.
        self._leaves = Leaves(self.parameters, torch.device("cpu"), own_memory=False)
        self._index = {id(leaf): i for i, leaf in enumerate(self._leaves.leaves)}
        self._index |= {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self._loans: dict[tuple[int, int], Leaves] = {}
        self._fresh: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._patches = EntrySwap(self._find())

    @property
    def has_loans(self) -> bool:
        """Return whether a stage has copies of another's parameters on its own device."""
        return any(not loan.is_alias() for loan in self._loans.values())

    def is_stale(self) -> bool:
        """Return whether modules or parameters have been replaced since."""
        return self._patches.is_stale()

    @contextmanager
    def entered(self, refresh: bool = True) -> Iterator[None]:
        """Context in which the modules compute with the leaves.

        Args:
            refresh: Whether parameters may have changed since the last time.
        """
        if refresh:
            self._leaves.refresh()
            for loan in self._loans.values():
                loan.refresh()
            self._fresh = set(self._loans)
        self._patches.apply()
        try:
            yield
        finally:
            self._patches.revert()

    def borrow(self, leaf: Tensor, stage: int) -> Tensor | None:
        """Stage's replacement for a parameter's leaf; `None` if it is none of ours."""
        index = self._index.get(id(leaf))
        if index is None:
            return None
        if self._owner.get(id(self.parameters[index]), 0) == stage:
            return self._leaves.leaves[index]
        return self._loan(index, stage)

    def original(self, leaf: Tensor) -> Tensor | None:
        """The parameter that a leaf stands for, if it does."""
        index = self._index.get(id(leaf))
        return None if index is None else self.parameters[index]

    def take_gradients(self) -> list[Tensor | None]:
        """Take the gradients accumulated for each parameter since the last call."""
        gradients = self._leaves.take_gradients()
        for (index, _), loan in sorted(self._loans.items(), key=lambda item: item[0]):
            (more,) = loan.take_gradients()
            before = gradients[index]
            if more is not None:
                more = more.to(self.parameters[index].device)
                gradients[index] = more if before is None else before + more
        return gradients

    def _loan(self, index: int, stage: int) -> Tensor:
        key = index, stage
        with self._lock:
            if key not in self._loans:
                parameter = self.parameters[index]
                self._loans[key] = Leaves([parameter], self._devices[stage])
                self._index[id(self._loans[key].leaves[0])] = index
            if key not in self._fresh:
                self._loans[key].refresh()
                self._fresh.add(key)
            return self._loans[key].leaves[0]

    def _find(self) -> list[tuple[Any, str, Any, Any]]:
        patches: list[tuple[Any, str, Any, Any]] = []
        for module in self._holders:
            stage = self._stage_of.get(id(module))

            def leaf_of(parameter: Tensor, stage: int | None = stage) -> Any:
                if stage is None:
                    return self._leaves.leaves[self._index[id(parameter)]]
                return self.borrow(parameter, stage)

            parameters = parameters_of(module)
            for name, parameter in parameters.items():
                if parameter is not None:
                    patches.append((parameters, name, parameter, leaf_of(parameter)))
            patches += recurrent.stand_ins(module, leaf_of)
        return patches
