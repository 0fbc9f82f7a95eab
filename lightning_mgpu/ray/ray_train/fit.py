"""Train a config or a user's function with Ray Train's `TorchTrainer`."""

import copy
import os
import pickle
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from ray.train import Result, RunConfig, ScalingConfig, get_checkpoint
from ray.train.lightning import RayTrainReportCallback
from ray.train.torch import TorchTrainer

from lightning_mgpu._compat import hydra
from lightning_mgpu.config.build import build, build_node
from lightning_mgpu.config.elsewhere import runs_elsewhere
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.ray import connection
from lightning_mgpu.ray.ranks import machine
from lightning_mgpu.ray.ray_train.prepare import prepare_trainer
from lightning_mgpu.ray.worker import adopt, set_by_ray

__all__ = ["fit"]

# Of the second: a run that is named as another goes on from that one's checkpoint.
_RAYS_NAME = "ray_train_run-"
_DEFAULT = {"_target_": "lightning_mgpu.ray.RayStrategy"}
Fit = tuple[Any, ...]
"""A Trainer, a model and its data."""


def fit(
    cfg_or_factory: DictConfig | Callable[[], Fit],
    scaling: int | ScalingConfig | Mapping[str, Any] | None = None,
    run_config: RunConfig | None = None,
) -> Result:
    """Train with Ray Train, each of whose workers builds its own objects.

    For those who want Ray Train's own results, storage, failure handling or data. Where a plain
    script will do, `Trainer(strategy=RayStrategy())` needs less.

    Args:
        cfg_or_factory: A config as composed from `conf/`, which is resolved here; or a function
            that returns ``(trainer, model)``, ``(trainer, model, datamodule)`` or loaders in place
            of the latter, for training and perhaps for validation. Its Trainer has
            `RayStrategy()` or another strategy that `prepare_trainer` takes. It is called on each
            worker.
        scaling: The workers: their number, Ray's `ScalingConfig`, or its arguments. Default: those
            of the config's strategy, or one.
        run_config: Ray's. Default: results below the config's `output_dir`, or where Ray puts
            them, under a name of their own.

    Returns:
        Ray's result: the last reported metrics and, as ``checkpoint.ckpt``, the latest checkpoint.

    Raises:
        ConfigError: The config's strategy has no workers on Ray.
        ray.train.TrainingFailedError: A worker failed, more often than `run_config` allows.
    """
    factory: Callable[[], Fit]
    if isinstance(cfg_or_factory, DictConfig):
        cfg = cfg_or_factory.copy()
        given = _scaling(scaling if scaling is not None else _workers_of(cfg))
        factory, storage = _of_config(cfg), _storage(cfg)
    else:
        factory, storage = cfg_or_factory, None
        given = _scaling(scaling if scaling is not None else 1)
    run_config = copy.copy(run_config) if run_config else RunConfig(storage_path=storage)
    if not run_config.name or run_config.name.startswith(_RAYS_NAME):
        run_config.name = f"lightning_mgpu-{uuid.uuid4().hex[:12]}"
    resources = given.resources_per_worker  # or, under Ray Tune, what it is drawn from
    cpus: Any = resources.get("CPU", 1) if isinstance(resources, dict) else 1
    connection.connect()
    state = ProcessState.capture(max(1, int(cpus)), libraries=[hydra.take_state])
    loop = _Loop(state, machine(), bytes(cloudpickle.dumps(factory)))
    with connection.signal_handlers_kept():
        return TorchTrainer(loop, scaling_config=given, run_config=run_config).fit()


@dataclass(frozen=True)
class _Loop:
    """Training loop of each worker."""

    state: ProcessState
    machine: str
    factory: bytes

    def __call__(self) -> None:
        adopt(self.state, self.machine, os.environ, set_by_ray())
        trainer, model, *data = pickle.loads(self.factory)()
        assert isinstance(trainer, Trainer)
        prepare_trainer(trainer)
        names = ("train_dataloaders", "val_dataloaders")  # the former may be a data module
        where: dict[str, Any] = dict(zip(names, data, strict=False))
        checkpoint = get_checkpoint()
        if checkpoint is None:
            trainer.fit(model, **where)
            return
        with checkpoint.as_directory() as directory:
            path = Path(directory, RayTrainReportCallback.CHECKPOINT_NAME)
            # Of an earlier worker of this run, so whatever objects it holds may be loaded.
            trainer.fit(model, **where, ckpt_path=path, weights_only=False)


def _of_config(cfg: DictConfig) -> Callable[[], Fit]:
    """Return a factory of a config's objects, with the strategy of one worker."""
    strategy = cfg.get("strategy") or _DEFAULT
    # The number of workers is Ray Train's affair.
    cfg.strategy = {name: value for name, value in strategy.items() if name != "num_workers"}
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)

    def factory() -> Fit:
        here = OmegaConf.create(resolved)
        assert isinstance(here, DictConfig)
        if here.get("seed") is not None:
            seed_everything(here.seed, workers=True, verbose=False)
        parts = build(here, callbacks=[])
        return (parts.trainer, parts.model, *([parts.datamodule] if parts.datamodule else []))

    return factory


def _workers_of(cfg: DictConfig) -> ScalingConfig:
    """Workers requested by the config's strategy."""
    if cfg.get("strategy") is None:
        return ScalingConfig(num_workers=1)
    strategy = build_node(cfg, "strategy")
    if not runs_elsewhere(strategy):
        raise ConfigError(
            f"strategy={type(strategy).__name__}: it has no workers on Ray. Set `+strategy=ray`, or"
            " none."
        )
    bundles = strategy.group().bundles
    return ScalingConfig(
        num_workers=len(bundles),
        use_gpu=strategy.use_gpu,
        resources_per_worker=bundles[0] or None,
    )


def _scaling(given: int | ScalingConfig | Mapping[str, Any]) -> ScalingConfig:
    if isinstance(given, int):
        return ScalingConfig(num_workers=given)
    return given if isinstance(given, ScalingConfig) else ScalingConfig(**given)


def _storage(cfg: DictConfig) -> str:
    directory = str(cfg.output_dir)
    return directory if "://" in directory else str(Path(directory).absolute())
