"""Persistent worker processes: start them once, run one function on every rank, many times.

Rank 0 is the calling process itself; ranks 1..n are clean Python processes that live on between
launches. This package knows torch and cloudpickle and nothing of Lightning, so that every
multi-process strategy can share it.
"""

from lightning_mgpu.launch.errors import (
    LaunchError,
    RankHungError,
    UnpicklableError,
    WorkerDiedError,
)
from lightning_mgpu.launch.pool import WorkerPool, default_pool
from lightning_mgpu.launch.rank import Rank

__all__ = [
    "LaunchError",
    "Rank",
    "RankHungError",
    "UnpicklableError",
    "WorkerDiedError",
    "WorkerPool",
    "default_pool",
]
