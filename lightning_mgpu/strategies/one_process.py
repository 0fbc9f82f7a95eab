"""What strategies that use several devices from one process have in common."""

from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_mgpu.strategies.checks import check_one_process

__all__: list[str] = []


class OneProcessStrategy(ParallelStrategy):
    """Several devices, one process: nothing to gather, reduce or wait for."""

    strategy_name: str
    # One process sees all data: samplers stay as they are.
    is_distributed = False

    def __repr__(self) -> str:
        # `pytorch_lightning` shows this when it refuses an object of the other namespace.
        return f"<{type(self).__name__}, for the Trainer of `lightning.pytorch`>"

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices, "the Trainer sets the devices"
        return self.parallel_devices[0]

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        check_one_process(self.strategy_name, num_nodes, self.world_size)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    @override
    def barrier(self, name: str | None = None) -> None:
        """Nothing to wait for: there is one process."""

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision
