"""Multi-device strategies for PyTorch Lightning, with Hydra configs.

Importing this package registers its strategies, so that ``Trainer(strategy="mgpu_ddp")`` works.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lightning_mgpu._version import __version__

if TYPE_CHECKING:
    from lightning_mgpu.engine.batch import Shard
    from lightning_mgpu.strategies import (
        DataParallelStrategy,
        DDPStrategy,
        PipelineDDPStrategy,
        PipelineStrategy,
    )

__all__ = [
    "DDPStrategy",
    "DataParallelStrategy",
    "PipelineDDPStrategy",
    "PipelineStrategy",
    "Shard",
    "__version__",
]

_PUBLIC = {
    "DDPStrategy": "lightning_mgpu.strategies",
    "DataParallelStrategy": "lightning_mgpu.strategies",
    "PipelineDDPStrategy": "lightning_mgpu.strategies",
    "PipelineStrategy": "lightning_mgpu.strategies",
    "Shard": "lightning_mgpu.engine.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_command() -> bool:
    """Whether this is our own command starting, by ``python -m`` or by its console script."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return after[:1] == [__name__]
    return bool(sys.argv) and PurePath(sys.argv[0]).name == __name__


# The command answers `--help` without torch; it registers the strategies when it builds a Trainer.
if not _is_command():
    importlib.import_module("lightning_mgpu.strategies")
