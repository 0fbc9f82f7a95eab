"""Run what a config describes: fit, validate, test, predict or plan."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mgpu._compat.lightning import (
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    Trainer,
    is_overridden,
    seed_everything,
)
from lightning_mgpu._compat.lightning_messages import (
    finds_no_checkpoint,
    names_missing_metric,
)
from lightning_mgpu._compat.torch_messages import STATE_DICT_IS_ANOTHERS
from lightning_mgpu.cli.checkpoint import LAST_GOOD, check_checkpoint, with_last_good
from lightning_mgpu.cli.cluster import connect, is_laptop
from lightning_mgpu.cli.signals import StopOnSignal
from lightning_mgpu.config.build import Parts, build
from lightning_mgpu.config.elsewhere import runs_elsewhere
from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.plan import command as planning
from lightning_mgpu.plan.predict import Plan
from lightning_mgpu.plan.show import write
from lightning_mgpu.strategies.ranks.predictions import join_batches
from lightning_mgpu.variables import restored

log = logging.getLogger(__name__)

_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
_MAX_SEED = 2**32 - 1  # numpy's


@dataclass(kw_only=True)
class RunResult:
    """Metrics and files of a run."""

    metrics: dict[str, float]
    """Last value of each logged metric, by name."""
    metric: float | None
    """Best value of the metric that the config names, which a sweeper optimises."""
    output_dir: Path
    """Directory of the run's files."""
    files: dict[str, Path] = field(default_factory=dict)
    """The run's files by kind."""
    model: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer
    plan: Plan | None = None
    """Predictions of `mode=plan`."""


def train(cfg: DictConfig) -> RunResult:
    """Run a composed config; outside Hydra, set `output_dir`.

    Args:
        cfg: As composed from `conf/`. `mode` says what to do; ``fit`` trains and then tests the
            best checkpoint, if the model and the data have a test; ``plan`` measures a few steps
            and predicts what pipelines of other sizes would take.

    Returns:
        Metrics, files and objects of the run.

    Raises:
        ConfigError: The config asks for something that cannot be; nothing has been trained.
        Stopped: SIGINT or SIGTERM came; the state of training has been saved.
    """
    output_dir = _output_dir(cfg)
    _check_values(cfg)
    mode = cfg.get("mode", "fit")
    if mode == "report":
        raise ConfigError(
            "mode=report: only draws existing results. Use the command, or"
            " lightning_mgpu.sweep.report.draw.draw."
        )
    if mode == "doctor":
        raise ConfigError(
            "mode=doctor: examines the machine, without a run. Use the command, or"
            " lightning_mgpu.doctor.command.doctor."
        )
    if mode == "replay":
        raise ConfigError(
            "mode=replay: computes a saved step again, without a run. Use the command, or"
            " lightning_mgpu.callbacks.replay."
        )
    if mode not in _MODES:
        without_a_run = ("report", "doctor", "replay")
        known = ", ".join([*_MODES, *without_a_run])
        raise ConfigError(f"mode={mode}: unknown. Choose one of {known}.")
    if cfg.get("ckpt_path") == LAST_GOOD:
        cfg = with_last_good(cfg, output_dir, resume=mode == "fit")
    elif cfg.get("ckpt_path") is not None:
        if not is_laptop(cfg):  # else it lies where the workers are
            check_checkpoint(str(cfg.ckpt_path), resume=mode == "fit")
    elif mode not in ("fit", "plan"):
        log.warning("mode=%s without ckpt_path: the model has random weights.", mode)
    if "loss" in str(cfg.get("metric")) and cfg.get("metric_mode") == "max":
        log.warning(
            "metric=%s with metric_mode=max keeps the worst; set metric_mode=min.", cfg.metric
        )
    plans = mode == "plan"
    stop = StopOnSignal(None if plans else output_dir / "checkpoints" / "interrupted.ckpt")
    with _seeded(cfg.get("seed")):
        parts = build(planning.arranged(cfg) if plans else cfg, callbacks=[stop])
        stop.at_once = runs_elsewhere(parts.trainer.strategy)
        connect(parts.trainer.strategy, cfg)
        if parts.trainer.is_global_zero:
            _save_config(cfg, output_dir)
            _keep_earlier_metrics(output_dir)
        with stop, _told_in_terms_of(cfg):
            outcome = _MODES[mode](parts, cfg, output_dir)
    if mode != "fit" and cfg.get("ckpt_path") is not None and parts.trainer.ckpt_path is None:
        # Lightning only warns, and goes on with random weights.
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: {output_dir} has no such checkpoint.")
    return RunResult(
        metrics=outcome.metrics,
        metric=outcome.metric,
        output_dir=output_dir,
        files={"config": output_dir / "config.yaml", **outcome.files},
        model=parts.model,
        datamodule=parts.datamodule,
        trainer=parts.trainer,
        plan=outcome.plan,
    )


@dataclass
class _Outcome:
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    metric: float | None = None
    plan: Plan | None = None


def _fit(parts: Parts, cfg: DictConfig, output_dir: Path) -> _Outcome:
    trainer, model, datamodule = parts.trainer, parts.model, parts.datamodule
    trainer.fit(model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    metrics = _numbers(trainer)
    files = _checkpoints(trainer, everywhere=is_laptop(cfg))
    if (output_dir / "metrics.csv").exists():
        files["metrics"] = output_dir / "metrics.csv"
    # Before the test: to load a checkpoint takes the callbacks back to what they knew at the time.
    score = _best_score(trainer, cfg.get("metric"))
    if _has_test(parts):
        best = str(files["best checkpoint"]) if "best checkpoint" in files else None
        trainer.test(
            model,
            datamodule=datamodule,
            ckpt_path=best,
            verbose=False,
            weights_only=False,  # this run's own file, so whatever objects it holds may be loaded
        )
        metrics |= _numbers(trainer)
    return _Outcome(metrics, files, _metric(score, metrics, cfg.get("metric")))


def _validate(parts: Parts, cfg: DictConfig, _: Path) -> _Outcome:
    parts.trainer.validate(
        parts.model, datamodule=parts.datamodule, ckpt_path=cfg.get("ckpt_path"), verbose=False
    )
    return _Outcome(_numbers(parts.trainer))


def _test(parts: Parts, cfg: DictConfig, _: Path) -> _Outcome:
    parts.trainer.test(
        parts.model, datamodule=parts.datamodule, ckpt_path=cfg.get("ckpt_path"), verbose=False
    )
    return _Outcome(_numbers(parts.trainer))


def _predict(parts: Parts, cfg: DictConfig, output_dir: Path) -> _Outcome:
    trainer = parts.trainer
    batches = trainer.predict(
        parts.model, datamodule=parts.datamodule, ckpt_path=cfg.get("ckpt_path")
    )
    if trainer.predict_loop.num_dataloaders > 1:
        predictions = [join_batches(loader) for loader in batches or []]
    else:
        predictions = join_batches(batches or [])
    # Ranks that were started from outside each run this, with a share of their own.
    environment = getattr(trainer.strategy, "cluster_environment", None)
    external = environment is not None and environment.creates_processes_externally
    path = output_dir / f"predictions{f'-rank{trainer.global_rank}' if external else ''}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(predictions, path)
    return _Outcome(files={"predictions": path})


def _plan(parts: Parts, cfg: DictConfig, output_dir: Path) -> _Outcome:
    plan = planning.plan(parts, planning.options_of(cfg))
    return _Outcome(files=write(plan, output_dir), plan=plan)


_MODES: dict[str, Callable[[Parts, DictConfig, Path], _Outcome]] = {
    "fit": _fit,
    "validate": _validate,
    "test": _test,
    "predict": _predict,
    "plan": _plan,
}


def _checkpoints(trainer: Trainer, everywhere: bool) -> dict[str, Path]:
    """The best checkpoint of the first callback that monitors a metric, and the last one.

    Args:
        trainer: After `fit`.
        everywhere: Count those as well that are not on this machine.
    """
    found: dict[str, Path] = {}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        # What a callback without a metric calls the best is the last.
        kind = "best checkpoint" if callback.monitor is not None else "last checkpoint"
        paths = ((kind, callback.best_model_path), ("last checkpoint", callback.last_model_path))
        for name, path in paths:
            # One from before a resume may be gone.
            if path and (everywhere or "://" in path or Path(path).exists()):
                found.setdefault(name, Path(path))
    return found


def _has_test(parts: Parts) -> bool:
    source = parts.datamodule if parts.datamodule is not None else parts.model
    return is_overridden("test_step", parts.model) and is_overridden("test_dataloader", source)


def _numbers(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _best_score(trainer: Trainer, name: str | None) -> float | None:
    """Best value of the metric by which checkpoints are kept."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor == name is not None:
            score = callback.best_model_score
            return None if score is None else float(score)
    return None


def _metric(score: float | None, metrics: dict[str, float], name: str | None) -> float | None:
    if score is not None or name is None:
        return score
    if name not in metrics:
        log.warning(
            "metric=%s was never logged, so the run has no result for a sweeper; logged were: %s.",
            name,
            ", ".join(sorted(metrics)) or "none",
        )
    return metrics.get(name)


def _output_dir(cfg: DictConfig) -> Path:
    try:
        output_dir = cfg.output_dir
    except OmegaConfBaseException as error:
        raise ConfigError(
            "output_dir: follows Hydra's run directory, and Hydra is not running here. Set it:"
            " `cfg.output_dir = 'outputs/my_run'`."
        ) from error
    if not isinstance(output_dir, str):
        raise ConfigError(f"output_dir={output_dir}: expected the path of a directory.")
    return Path(output_dir)


def _check_values(cfg: DictConfig) -> None:
    """Check that no value is missing before anything is built."""
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{error.full_key or 'config'}: {reason}.") from error


def _save_config(cfg: DictConfig, output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    except OSError as error:
        raise ConfigError(f"output_dir={output_dir}: cannot write there: {error}.") from error


def _keep_earlier_metrics(output_dir: Path) -> None:
    """Rename the metrics of an earlier run in the same directory, which `CSVLogger` deletes."""
    metrics = output_dir / "metrics.csv"
    if metrics.exists():
        names = (output_dir / f"metrics-{number}.csv" for number in itertools.count(1))
        metrics.rename(next(name for name in names if not name.exists()))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed everything, and restore the environment afterwards: the next run has its own seed."""
    if seed is not None and (type(seed) is not int or not 0 <= seed <= _MAX_SEED):
        raise ConfigError(f"seed={seed}: expected an integer from 0 to {_MAX_SEED}, or null.")
    with restored(*_SEED_VARIABLES):
        if seed is not None:
            seed_everything(seed, workers=True, verbose=False)
        yield


@contextmanager
def _told_in_terms_of(cfg: DictConfig) -> Iterator[None]:
    """Raise errors and warnings of Lightning's as ones that name the config key."""
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        if names_missing_metric(error):
            raise ConfigError(
                f"metric={cfg.get('metric')}: {one_line(error)} Set `metric=` to one"
                " that is logged (with `metric_mode=min` for a loss), or to null."
            ) from error
        if cfg.get("ckpt_path") is None or STATE_DICT_IS_ANOTHERS not in str(error):
            raise
        reason = one_line(error)
        raise ConfigError(
            f"ckpt_path={cfg.ckpt_path}: the checkpoint is of another model ({reason[:300]} ...)."
            " Use the model and the sizes it was trained with."
        ) from error
    except ValueError as error:
        if not finds_no_checkpoint(error, cfg.get("ckpt_path")):
            raise
        # One of Lightning's keywords (`hpc`), which finds nothing.
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: {error}") from error
