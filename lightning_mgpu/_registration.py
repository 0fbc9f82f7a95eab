"""Register the strategies with Lightning once Lightning is imported.

Lightning takes seconds to import, which programs that train nothing should not wait for: the
command's ``--help``, the driver of a sweep. Each of its namespaces has a registry of its own, and
gets the same names; the classes behind them are imported when one is asked for.
"""

import importlib
from functools import partial
from typing import Any, NoReturn

from lightning_mgpu._compat.after_import import when_imported
from lightning_mgpu._compat.namespace import BOTH, Namespace, choose

_STRATEGIES = {
    "dp": ("DataParallelStrategy", "Data parallel in one process, a thread per device"),
    "mgpu_ddp": (
        "DDPStrategy",
        "DDP through a pool of persistent workers; safe under Hydra multirun",
    ),
    "pipeline": ("PipelineStrategy", "One model in stages, one for each device"),
    "pipeline_ddp": ("PipelineDDPStrategy", "Processes with a pipeline each, DDP between them"),
}
_ON_RAY = {
    "ddp_ray": "RayStrategy",
    "fsdp_ray": "RayShardedStrategy",
    "pipeline_ray": "RayPipelineStrategy",
}


def register() -> None:
    """Register the strategies with each namespace now, or as soon as it has been imported."""
    for namespace in BOTH:
        when_imported(namespace, _register)


def _register(namespace: Namespace) -> None:
    registry = importlib.import_module(namespace.module("pytorch.strategies")).StrategyRegistry
    for name, (class_name, description) in _STRATEGIES.items():
        if name not in registry:
            create = partial(_create, namespace, name, class_name)
            registry.register(name, create, description=description)
    for name, class_name in _ON_RAY.items():
        if name not in registry:
            refuse = partial(_refuse, namespace, name, class_name)
            registry.register(name, refuse, description="On Ray, given as an object")


def _create(namespace: Namespace, name: str, class_name: str) -> Any:
    try:
        choose(namespace, f"its Trainer was given `strategy={name!r}`")
    except TypeError as error:
        raise TypeError(f"`{namespace.pytorch}.Trainer(strategy={name!r})`: {error}") from None
    return getattr(importlib.import_module("lightning_mgpu.strategies"), class_name)()


def _refuse(namespace: Namespace, name: str, class_name: str) -> NoReturn:
    exceptions = importlib.import_module(namespace.module("fabric.utilities.exceptions"))
    raise exceptions.MisconfigurationException(
        f"`Trainer(strategy={name!r})`: a name cannot say how many workers to ask Ray for. Use"
        f" `Trainer(strategy={class_name}(num_workers=...))` with `from lightning_mgpu.ray import"
        f" {class_name}`."
    )
