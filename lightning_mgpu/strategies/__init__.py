"""Strategies for Lightning's `Trainer`. Importing this module registers their names."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_mgpu.strategies.data_parallel import DataParallelStrategy
from lightning_mgpu.strategies.distributed import DDPStrategy
from lightning_mgpu.strategies.pipeline import PipelineStrategy
from lightning_mgpu.strategies.pipeline_ddp import PipelineDDPStrategy

__all__ = ["DDPStrategy", "DataParallelStrategy", "PipelineDDPStrategy", "PipelineStrategy"]

for _strategy in (DataParallelStrategy, DDPStrategy, PipelineStrategy, PipelineDDPStrategy):
    if _strategy.strategy_name not in StrategyRegistry:
        _strategy.register_strategies(StrategyRegistry)
