"""Base class of the master and its copies."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.data_parallel.copying.remap import Remap
from lightning_mgpu.engine.data_parallel.copying.structure import Structure
from lightning_mgpu.engine.parameter_leaves import Leaves


class Replica(ABC):
    """Modules, parameter leaves and buffers of one slot.

    Args:
        structure: The master's parts.
        memo: What stands for them here, by their ids: leaves and units so far.
        leaves: A leaf for each parameter.
        units: A copy of each unit.
        layers: The master's layers whose running statistics are put together.
        devices: Where the replicas compute.
        slot: Which of them this is.
        own_attributes: As in `Replicas`.

    Attributes:
        module: The module to call.
        recorder: Keeps the batch statistics of this replica's layers.
    """

    def __init__(
        self,
        structure: Structure,
        memo: dict[int, Any],
        leaves: Leaves,
        units: list[Any],
        layers: list[nn.Module],
        devices: Sequence[torch.device],
        slot: int,
        own_attributes: frozenset[str],
    ) -> None:
        self.structure = structure
        self.leaves = leaves
        self.units = units
        self.slot = slot
        self.device, self.root = devices[slot], devices[0]
        self.remap = Remap(memo)
        self.own_attributes = own_attributes
        self.module: nn.Module
        self.recorder = Recorder(layers)

    @abstractmethod
    def refresh(self) -> None:
        """Update from the master's changes since the last step."""

    @abstractmethod
    def entered(self, overrides: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Ready for a task: with attributes overridden and statistics recorded."""
