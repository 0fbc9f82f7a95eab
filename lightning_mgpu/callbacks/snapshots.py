"""Copies of weights and optimizer state in memory, to go back to."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import Trainer
from lightning_mgpu.engine.batch import map_leaves


@dataclass(frozen=True)
class Snapshot:
    """Weights, buffers and optimizer state of one step, on the host.

    Attributes:
        step: Optimizer steps made by then.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizers: list[Any]

    @classmethod
    def take(cls, trainer: Trainer) -> "Snapshot":
        """Copy what the Trainer has now."""
        return cls(
            trainer.global_step,
            {name: _on_host(tensor) for name, tensor in _tensors(trainer)},
            [_on_host(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
        )

    def restore(self, trainer: Trainer) -> None:
        """Put it back. Learning rates and other options of optimizers stay as they are."""
        with torch.no_grad():
            for name, tensor in _tensors(trainer):
                if name in self.tensors:
                    tensor.copy_(self.tensors[name])
        for optimizer, state in zip(trainer.optimizers, self.optimizers, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(state), "param_groups": groups})


class Snapshots:
    """The last two of the snapshots that are taken every so many steps.

    Args:
        steps: How many optimizer steps are between them.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._kept: list[Snapshot] = []

    def look(self, trainer: Trainer) -> None:
        """Take one if it is time to; between two batches."""
        step = trainer.global_step
        if self._kept and step < self._kept[-1].step + self._steps:
            return
        self._kept = [*self._kept[-1:], Snapshot.take(trainer)]

    def go_back(self, trainer: Trainer) -> int:
        """Restore the older one, at least `steps` steps old once there are that many.

        Returns:
            The step that it is of.
        """
        snapshot = self._kept[0]
        snapshot.restore(trainer)
        self._kept = [snapshot]
        return snapshot.step


def _tensors(trainer: Trainer) -> list[tuple[str, Tensor]]:
    model = trainer.lightning_module
    return [*model.named_parameters(), *model.named_buffers()]


def _on_host(value: Any) -> Any:
    return map_leaves(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf,
        value,
    )
