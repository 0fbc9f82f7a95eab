"""Pipeline parallelism in each of several processes, with DDP between them."""

from typing import Any

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_mgpu.engine.workers import available_cores
from lightning_mgpu.strategies.distributed import DDPStrategy
from lightning_mgpu.strategies.stages.pipelined import PipelineMixin

__all__ = ["PipelineDDPStrategy"]


class PipelineDDPStrategy(PipelineMixin, DDPStrategy):
    """Train in several processes, each of which computes the model in stages.

    ``Trainer(devices=4, strategy=PipelineDDPStrategy(stages=2))`` is two processes with two devices
    each: within a process `PipelineStrategy`, between processes `DDPStrategy`, which averages
    gradients once a batch. Samplers and `world_size` count processes, not devices. The processes
    are launched as `DDPStrategy` does, or come from ``torchrun`` or SLURM: then one is started for
    every `stages` devices of a node.

    Registered as ``"pipeline_ddp"``.

    Args:
        *args: As `DDPStrategy`.
        stages: Devices of each process, and stages of its pipeline (default 2), of which there are
            more with `stages_per_device`.
        **kwargs: As `PipelineStrategy` from `module` on, and as `DDPStrategy`.

    Raises:
        ValueError: An argument is none of its choices.
        MisconfigurationException: The devices cannot be shared out; or see `DDPStrategy`.
    """

    strategy_name = "pipeline_ddp"

    def __init__(self, *args: Any, stages: int = 2, **kwargs: Any) -> None:
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(
                f"`{type(self).__name__}(stages={stages!r})`: give the number of devices of each"
                " process, at least 1."
            )
        self.stages = stages
        super().__init__(*args, **kwargs)

    @property
    @override
    def parallel_devices(self) -> list[torch.device] | None:
        """Devices of all processes on this node, those of one process next to each other."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._check_devices(len(devices or ()))
        self._parallel_devices = devices

    def _check_devices(self, count: int) -> None:
        if count % self.stages:
            raise MisconfigurationException(
                f"`Trainer(devices={count},"
                f" strategy=PipelineDDPStrategy(stages={self.stages}))`: {count} devices"
                f" cannot be divided into processes with {self.stages} stages each. Use a"
                f" multiple of {self.stages}."
            )

    @property
    @override
    def num_processes(self) -> int:
        return len(self.parallel_devices or ()) // self.stages

    @property
    @override
    def root_device(self) -> torch.device:
        return self.own_devices[0]

    @property
    @override
    def own_devices(self) -> list[torch.device]:
        return self.devices_of(self.local_rank)

    @override
    def devices_of(self, local_rank: int) -> list[torch.device]:
        assert self.parallel_devices is not None
        first = local_rank * self.stages
        return self.parallel_devices[first : first + self.stages]

    @property
    @override
    def threads_per_device(self) -> int:
        return max(1, available_cores() // len(self.parallel_devices or (0,)))

    @property
    @override
    def bound_device(self) -> None:
        """Always `None`: each stage's gradients are reduced between its own devices."""

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # Without `device_ids` it leaves modules and batches where they are.
        return DistributedDataParallel(model, **self._ddp_kwargs)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(
            cls.strategy_name, cls, description="Processes with a pipeline each, DDP between them"
        )
