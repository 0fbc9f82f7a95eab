"""Training on a Ray cluster from a plain script: ``Trainer(strategy=RayStrategy(num_workers=4))``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mgpu.ray.session import close, keep_warm
    from lightning_mgpu.ray.strategy import RayStrategy

__all__ = ["RayStrategy", "close", "keep_warm"]

_PUBLIC = {
    "RayStrategy": "lightning_mgpu.ray.strategy",
    "close": "lightning_mgpu.ray.session",
    "keep_warm": "lightning_mgpu.ray.session",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
