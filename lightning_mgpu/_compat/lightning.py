"""Lightning's names, from whichever of its two packages the program uses.

The rest of this package imports them from here and nowhere else::

    from lightning_mgpu._compat.lightning import Trainer

Types are those of `lightning`, whose code is that of `pytorch_lightning`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat import namespace

if TYPE_CHECKING:
    from lightning.fabric.loggers.csv_logs import CSVLogger as CSVLogger
    from lightning.fabric.loggers.csv_logs import _ExperimentWriter as _ExperimentWriter
    from lightning.fabric.plugins import CheckpointIO as CheckpointIO
    from lightning.fabric.plugins import ClusterEnvironment as ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import (
        LightningEnvironment as LightningEnvironment,
    )
    from lightning.fabric.strategies.fsdp import (
        _get_full_state_dict_context as _get_full_state_dict_context,
    )
    from lightning.fabric.utilities.data import sized_len as sized_len
    from lightning.fabric.utilities.device_dtype_mixin import (
        _DeviceDtypeModuleMixin as _DeviceDtypeModuleMixin,
    )
    from lightning.fabric.utilities.distributed import (
        DistributedSamplerWrapper as DistributedSamplerWrapper,
    )
    from lightning.fabric.utilities.distributed import (
        _DatasetSamplerWrapper as _DatasetSamplerWrapper,
    )
    from lightning.fabric.utilities.distributed import (
        _init_dist_connection as _init_dist_connection,
    )
    from lightning.fabric.utilities.exceptions import (
        MisconfigurationException as MisconfigurationException,
    )
    from lightning.fabric.utilities.seed import reset_seed as reset_seed
    from lightning.fabric.utilities.types import _PATH as _PATH
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningDataModule as LightningDataModule
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch import seed_everything as seed_everything
    from lightning.pytorch.accelerators import Accelerator as Accelerator
    from lightning.pytorch.accelerators import CPUAccelerator as CPUAccelerator
    from lightning.pytorch.accelerators import CUDAAccelerator as CUDAAccelerator
    from lightning.pytorch.callbacks import Checkpoint as Checkpoint
    from lightning.pytorch.callbacks import LearningRateFinder as LearningRateFinder
    from lightning.pytorch.callbacks import ModelCheckpoint as ModelCheckpoint
    from lightning.pytorch.callbacks import ModelSummary as ModelSummary
    from lightning.pytorch.callbacks import StochasticWeightAveraging as StochasticWeightAveraging
    from lightning.pytorch.loggers import Logger as Logger
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.loops.loop import _Loop as _Loop
    from lightning.pytorch.overrides.distributed import (
        UnrepeatedDistributedSampler as UnrepeatedDistributedSampler,
    )
    from lightning.pytorch.overrides.distributed import (
        UnrepeatedDistributedSamplerWrapper as UnrepeatedDistributedSamplerWrapper,
    )
    from lightning.pytorch.overrides.distributed import (
        _IndexBatchSamplerWrapper as _IndexBatchSamplerWrapper,
    )
    from lightning.pytorch.plugins.io import AsyncCheckpointIO as AsyncCheckpointIO
    from lightning.pytorch.plugins.precision import Precision as Precision
    from lightning.pytorch.strategies import DDPStrategy as DDPStrategy
    from lightning.pytorch.strategies import FSDPStrategy as FSDPStrategy
    from lightning.pytorch.strategies import ParallelStrategy as ParallelStrategy
    from lightning.pytorch.strategies import Strategy as Strategy
    from lightning.pytorch.strategies.launchers import (
        _SubprocessScriptLauncher as _SubprocessScriptLauncher,
    )
    from lightning.pytorch.strategies.launchers.launcher import _Launcher as _Launcher
    from lightning.pytorch.trainer.call import _call_teardown_hook as _call_teardown_hook
    from lightning.pytorch.trainer.states import TrainerFn as TrainerFn
    from lightning.pytorch.trainer.states import TrainerState as TrainerState
    from lightning.pytorch.trainer.states import TrainerStatus as TrainerStatus
    from lightning.pytorch.tuner.lr_finder import _determine_lr_attr_name as _determine_lr_attr_name
    from lightning.pytorch.utilities import rank_zero_info as rank_zero_info
    from lightning.pytorch.utilities import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES as _SUPPORTED_MODES
    from lightning.pytorch.utilities.combined_loader import CombinedLoader as CombinedLoader
    from lightning.pytorch.utilities.exceptions import SIGTERMException as SIGTERMException
    from lightning.pytorch.utilities.exceptions import _TunerExitException as _TunerExitException
    from lightning.pytorch.utilities.model_helpers import is_overridden as is_overridden
    from lightning.pytorch.utilities.parsing import lightning_getattr as lightning_getattr
    from lightning.pytorch.utilities.parsing import lightning_setattr as lightning_setattr
    from lightning.pytorch.utilities.signature_utils import (
        is_param_in_hook_signature as is_param_in_hook_signature,
    )
    from lightning.pytorch.utilities.types import LRSchedulerConfig as LRSchedulerConfig

_NAMES = {
    "fabric.loggers.csv_logs": ("CSVLogger", "_ExperimentWriter"),
    "fabric.plugins": ("CheckpointIO", "ClusterEnvironment"),
    "fabric.plugins.environments.lightning": ("LightningEnvironment",),
    "fabric.strategies.fsdp": ("_get_full_state_dict_context",),
    "fabric.utilities.device_dtype_mixin": ("_DeviceDtypeModuleMixin",),
    "fabric.utilities.data": ("sized_len",),
    "fabric.utilities.distributed": (
        "DistributedSamplerWrapper",
        "_DatasetSamplerWrapper",
        "_init_dist_connection",
    ),
    "fabric.utilities.exceptions": ("MisconfigurationException",),
    "fabric.utilities.seed": ("reset_seed",),
    "fabric.utilities.types": ("_PATH",),
    "pytorch": ("Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"),
    "pytorch.accelerators": ("Accelerator", "CPUAccelerator", "CUDAAccelerator"),
    "pytorch.callbacks": (
        "Checkpoint",
        "LearningRateFinder",
        "ModelCheckpoint",
        "ModelSummary",
        "StochasticWeightAveraging",
    ),
    "pytorch.loggers": ("Logger",),
    "pytorch.loggers.logger": ("DummyLogger",),
    "pytorch.loops.loop": ("_Loop",),
    "pytorch.overrides.distributed": (
        "UnrepeatedDistributedSampler",
        "UnrepeatedDistributedSamplerWrapper",
        "_IndexBatchSamplerWrapper",
    ),
    "pytorch.plugins.io": ("AsyncCheckpointIO",),
    "pytorch.plugins.precision": ("Precision",),
    "pytorch.strategies": (
        "DDPStrategy",
        "FSDPStrategy",
        "ParallelStrategy",
        "Strategy",
    ),
    "pytorch.strategies.launchers": ("_SubprocessScriptLauncher",),
    "pytorch.strategies.launchers.launcher": ("_Launcher",),
    "pytorch.trainer.call": ("_call_teardown_hook",),
    "pytorch.trainer.states": ("TrainerFn", "TrainerState", "TrainerStatus"),
    "pytorch.tuner.lr_finder": ("_determine_lr_attr_name",),
    "pytorch.utilities": ("rank_zero_info", "rank_zero_warn"),
    "pytorch.utilities.combined_loader": ("_SUPPORTED_MODES", "CombinedLoader"),
    "pytorch.utilities.exceptions": ("SIGTERMException", "_TunerExitException"),
    "pytorch.utilities.model_helpers": ("is_overridden",),
    "pytorch.utilities.parsing": ("lightning_getattr", "lightning_setattr"),
    "pytorch.utilities.signature_utils": ("is_param_in_hook_signature",),
    "pytorch.utilities.types": ("LRSchedulerConfig",),
}
"""Public and private names, by the module that has them."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(namespace.current().module(_MODULES[name]))
    if not hasattr(module, name):
        raise ImportError(
            f"`{module.__name__}` has no `{name}`. Install a version of Lightning that"
            " lightning_mgpu is made for: see its requirements."
        )
    globals()[name] = value = getattr(module, name)
    return value
