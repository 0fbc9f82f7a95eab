"""Base class of strategies that use several devices from a single process."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu.strategies.base.checks import check_one_process
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy

SHARED_OBJECTS = (Trainer, Strategy, LightningDataModule, Logger, Callback)
"""Objects that a model may refer to and that no part of it has a copy of its own of."""

OWN_ATTRIBUTES = (vars(LightningModule()).keys() - vars(nn.Module()).keys()) | {
    "_hparams_initial",
    "_hparams_name",
    "_log_hyperparams",
}
"""Attributes of a LightningModule that Lightning keeps for itself."""


class SingleProcessStrategy(MultiDeviceStrategy):
    """Several devices, one process: no process group, no change of samplers, no reductions.

    The object may be given to one Trainer after another; it keeps the devices of the first.
    """

    # Read by Lightning: one process sees all data.
    is_distributed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._trainers_accelerator: Accelerator | None = None
        self._trainers_precision: Precision | None = None
        self._initialised = False
        super().__init__(*args, **kwargs)
        self._initialised = True

    def __repr__(self) -> str:
        # `pytorch_lightning` shows this when it refuses an object of the other namespace.
        return f"<{type(self).__name__}, for the Trainer of `lightning.pytorch`>"

    # Lightning refuses a strategy that has an accelerator or a precision by the arguments it was
    # made with, if the Trainer has them too. What an earlier Trainer has set is neither.

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._accelerator or self._trainers_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._trainers_accelerator = accelerator

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or self._trainers_precision or Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if self._initialised:
            self._trainers_precision = precision_plugin
        else:
            self._precision_plugin = precision_plugin

    @property
    @override
    def root_device(self) -> torch.device:
        return self.devices[0]

    @property
    def devices(self) -> list[torch.device]:
        """The devices, as the Trainer has set them."""
        assert self.parallel_devices
        return self.parallel_devices

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        check_one_process(type(self).__name__, num_nodes, self.world_size)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    @override
    def barrier(self, name: str | None = None) -> None:
        """Do nothing: there is one process."""

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision
