"""A few samples through the stages, one after another in the calling thread."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.pipelining import values
from lightning_mgpu.engine.pipelining.partition import Name, Partition

__all__: list[str] = []


class Trial:
    """Runs a partition on some samples of a call.

    Args:
        partition: The stages.
        devices: The device of each.
        tensors: The call's tensors, by name.
        dims: The batch dimension of those that are split.
    """

    def __init__(
        self,
        partition: Partition,
        devices: Sequence[torch.device],
        tensors: Mapping[Name, Tensor],
        dims: Mapping[Name, int],
    ) -> None:
        self._partition, self._devices = partition, devices
        self._tensors, self._dims = tensors, dims

    def run(self, start: int, stop: int) -> dict[Name, Any]:
        """The results for samples `start` to `stop`, by name."""
        found: dict[Name, Any] = {
            name: self._samples(name, tensor, start, stop)
            for name, tensor in self._tensors.items()
            if name in self._partition.arguments
        }
        context = ThreadContext.capture()
        for stage in self._partition.stages:
            device = self._devices[stage.index]
            with context.entered(device):
                inputs = [_moved(found[name], device) for name in stage.inputs]
                found.update(zip(stage.outputs, stage.compute(inputs), strict=True))
        return {name: found[name] for name in self._partition.results}

    def _samples(self, name: Name, tensor: Tensor, start: int, stop: int) -> Tensor:
        """A copy, which may be written to."""
        dim = self._dims.get(name)
        part = tensor.detach() if dim is None else tensor.detach().narrow(dim, start, stop - start)
        part = part.clone()
        if tensor.requires_grad and torch.is_grad_enabled():
            part.requires_grad_()
        return values.enter(part)


def _moved(value: Any, device: torch.device) -> Any:
    return values.map_tensors(lambda tensor: tensor.to(device), value)
