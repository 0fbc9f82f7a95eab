"""Multi-device strategies for PyTorch Lightning, with Hydra configs.

Importing this package registers its strategies, so that ``Trainer(strategy="mgpu_ddp")`` works: at
once if Lightning is imported, and otherwise when it is.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_mgpu._registration import register
from lightning_mgpu._version import __version__

if TYPE_CHECKING:
    from lightning_mgpu.engine.batch import Shard, gather, scatter
    from lightning_mgpu.engine.compare import ParityError
    from lightning_mgpu.strategies import (
        DataParallelStrategy,
        DDPStrategy,
        PipelineDDPStrategy,
        PipelineStrategy,
    )

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "ParityError",
    "PipelineDDPStrategy",
    "PipelineStrategy",
    "Shard",
    "__version__",
    "gather",
    "scatter",
]

_PUBLIC = {
    "DDPStrategy": "lightning_mgpu.strategies",
    "DataParallelStrategy": "lightning_mgpu.strategies",
    "ParityError": "lightning_mgpu.engine.compare",
    "PipelineDDPStrategy": "lightning_mgpu.strategies",
    "PipelineStrategy": "lightning_mgpu.strategies",
    "Shard": "lightning_mgpu.engine.batch",
    "gather": "lightning_mgpu.engine.batch",
    "scatter": "lightning_mgpu.engine.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
