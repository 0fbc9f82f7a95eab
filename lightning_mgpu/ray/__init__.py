"""Training on a Ray cluster from a plain script, with ``Trainer(strategy=RayStrategy(...))``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mgpu.ray.ray_pipeline import RayPipelineStrategy
    from lightning_mgpu.ray.ray_train.fit import fit
    from lightning_mgpu.ray.ray_train.prepare import prepare_trainer
    from lightning_mgpu.ray.sharded import RayShardedStrategy
    from lightning_mgpu.ray.strategy import RayStrategy
    from lightning_mgpu.ray.worker_group import close, keep_warm

__all__ = [
    "RayPipelineStrategy",
    "RayShardedStrategy",
    "RayStrategy",
    "close",
    "fit",
    "keep_warm",
    "prepare_trainer",
]

_PUBLIC = {
    "RayPipelineStrategy": "lightning_mgpu.ray.ray_pipeline",
    "RayShardedStrategy": "lightning_mgpu.ray.sharded",
    "RayStrategy": "lightning_mgpu.ray.strategy",
    "close": "lightning_mgpu.ray.worker_group",
    "fit": "lightning_mgpu.ray.ray_train.fit",
    "keep_warm": "lightning_mgpu.ray.worker_group",
    "prepare_trainer": "lightning_mgpu.ray.ray_train.prepare",
}
STRATEGIES = tuple(
    f"{where}.{name}"
    for name, module in _PUBLIC.items()
    if name.endswith("Strategy")
    for where in (__name__, module)
)
"""What a config names as `_target_` to train on Ray."""

_HOROVOD = (
    "Horovod has left Lightning. `RayStrategy` takes the same arguments and reduces the gradients"
    " with torch's own DDP, over NCCL or Gloo."
)
# What users of `ray_lightning` may look for.
_GONE = {
    "RayPlugin": "it is called `RayStrategy` now.",
    "HorovodRayPlugin": _HOROVOD,
    "HorovodRayStrategy": _HOROVOD,
    "RayShardedPlugin": "it is called `RayShardedStrategy` now, and uses Lightning's FSDP.",
}


def __getattr__(name: str) -> Any:
    if name in _GONE:
        raise ImportError(f"`{__name__}.{name}` does not exist: {_GONE[name]}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
