"""Strategies for Lightning's `Trainer`. Importing this module registers their names."""

from functools import partial
from typing import NoReturn

from lightning_mgpu._compat.lightning import MisconfigurationException, StrategyRegistry
from lightning_mgpu.strategies.data_parallel import DataParallelStrategy
from lightning_mgpu.strategies.distributed import DDPStrategy
from lightning_mgpu.strategies.pipeline import PipelineStrategy
from lightning_mgpu.strategies.pipeline_ddp import PipelineDDPStrategy

__all__ = ["DDPStrategy", "DataParallelStrategy", "PipelineDDPStrategy", "PipelineStrategy"]

for _strategy in (DataParallelStrategy, DDPStrategy, PipelineStrategy, PipelineDDPStrategy):
    if _strategy.strategy_name not in StrategyRegistry:
        _strategy.register_strategies(StrategyRegistry)


def _refuse(name: str, class_name: str) -> NoReturn:
    raise MisconfigurationException(
        f"`Trainer(strategy={name!r})`: a name cannot say how many workers to ask Ray for. Use"
        f" `Trainer(strategy={class_name}(num_workers=...))` with `from lightning_mgpu.ray import"
        f" {class_name}`."
    )


_ON_RAY = {
    "ddp_ray": "RayStrategy",
    "fsdp_ray": "RayShardedStrategy",
    "pipeline_ray": "RayPipelineStrategy",
}
for _name, _class_name in _ON_RAY.items():
    if _name not in StrategyRegistry:
        StrategyRegistry.register(
            _name, partial(_refuse, _name, _class_name), description="On Ray, given as an object"
        )
