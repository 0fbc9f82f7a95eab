"""Strategies for Lightning's `Trainer`."""

from lightning_mgpu.strategies.data_parallel import DataParallelStrategy
from lightning_mgpu.strategies.distributed import DDPStrategy
from lightning_mgpu.strategies.pipeline import PipelineStrategy
from lightning_mgpu.strategies.pipeline_ddp import PipelineDDPStrategy

__all__ = ["DDPStrategy", "DataParallelStrategy", "PipelineDDPStrategy", "PipelineStrategy"]
