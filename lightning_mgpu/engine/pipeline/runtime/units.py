"""Hooks that notify micro-batches of calls of units."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat import torch_modules
from lightning_mgpu.engine.device import copied
from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.runtime.recompute import Recomputed
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller, current

_HOOK = "lightning_mgpu.pipeline"

Recompute = Callable[[Traveller, nn.Module, Any, Any], Recomputed | None]
"""What keeps only the inputs of a call of a unit, if anything is to."""


class Units:
    """Submodules that belong to stages.

    Args:
        stage_of: By name, each unit and its stage.
        devices: The device of each stage.
    """

    def __init__(
        self, stage_of: Mapping[str, tuple[nn.Module, int]], devices: Sequence[torch.device]
    ) -> None:
        all_devices = frozenset(devices)
        self._units = [
            _Unit(name, module, stage, devices[stage], all_devices)
            for name, (module, stage) in stage_of.items()
        ]

    @contextmanager
    def attached(self, recompute: Recompute | None = None) -> Iterator[None]:
        """Context in which calls of units are noticed.

        Args:
            recompute: Decides what is to be computed again in backward.
        """
        for unit in self._units:
            unit.attach(recompute)
        try:
            yield
        finally:
            for unit in self._units:
                unit.detach()


class _Unit:
    def __init__(
        self,
        name: str,
        module: nn.Module,
        stage: int,
        device: torch.device,
        all_devices: frozenset[torch.device],
    ) -> None:
        self._name, self._module, self._stage = name, module, stage
        self._device, self._all_devices = device, all_devices
        self._recompute: Recompute | None = None

    def attach(self, recompute: Recompute | None) -> None:
        self._recompute = recompute
        compiled = torch_modules.compiled_call(self._module)
        if compiled is not None:
            # What is compiled in place has its hooks compiled, too.
            self._compiled = compiled
            torch_modules.set_compiled_call(self._module, self._call_compiled)
            return
        torch_modules.attach_around(self._module, _HOOK, self._before, self._after)

    def detach(self) -> None:
        if torch_modules.compiled_call(self._module) is not None:
            torch_modules.set_compiled_call(self._module, self._compiled)
            return
        torch_modules.detach(self._module, _HOOK)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        traveller = current()
        if traveller is None:
            if len(self._all_devices) == 1:
                return None
            # Called in backward, by somebody's activation checkpointing.
            return stage_values.map_tensors(self._moved, (args, kwargs))
        if self._recompute is not None:
            traveller.recomputing.append(None)  # for `_after`, which is called if this fails, too
        args, kwargs = traveller.enter_unit(self._name, self._stage, args, kwargs)
        if self._recompute is not None:
            recomputed = self._recompute(traveller, module, args, kwargs)
            traveller.recomputing[-1] = recomputed
            if recomputed is not None:
                args, kwargs = recomputed.begin(traveller, args, kwargs)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        traveller = current()
        if traveller is None:
            return None
        recomputed = traveller.recomputing.pop() if self._recompute is not None else None
        if output is None and sys.exc_info()[0] is not None:
            if recomputed is not None:
                recomputed.abandon()
            traveller.abandon_unit()
            return None
        if recomputed is not None:
            output = recomputed.end(traveller, output)
        return traveller.leave_unit(output)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        found = self._before(self._module, args, kwargs)
        args, kwargs = (args, kwargs) if found is None else found
        output = None
        try:
            output = self._compiled(*args, **kwargs)
        finally:
            after = self._after(self._module, args, output)
        return output if after is None else after

    def _moved(self, tensor: Tensor) -> Tensor:
        return copied(tensor, self._device) if tensor.device in self._all_devices else tensor
