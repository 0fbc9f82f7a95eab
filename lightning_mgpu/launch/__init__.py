"""Persistent worker processes: start them once, run one function on every rank, many times.

Rank 0 is the calling process itself; ranks 1..n are clean Python processes that live on between
launches. This package knows torch and cloudpickle and nothing of Lightning, so that every
multi-process strategy can share it. Names load when they are used: the driver of a sweep needs
some of them, and no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PUBLIC = {
    "LaunchError": "errors",
    "Rank": "rank",
    "RankHungError": "errors",
    "UnpicklableError": "errors",
    "WorkerDiedError": "errors",
    "WorkerPool": "pool",
    "default_pool": "pool",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
