"""Retry a trial that ran out of memory with half the batch and twice the accumulation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.space.space import Space

HALVINGS = "batch_halvings"
"""Among the values of a trial: how often its batch was halved. No name of a dimension."""

_BATCH_KEYS = ("data.batch_size", "datamodule.batch_size", "batch_size")
_ACCUMULATION = "trainer.accumulate_grad_batches"


def compose(
    job: Job, space: Space, config: Mapping[str, Any], number: int, sweep_dir: Path
) -> tuple[list[str], DictConfig]:
    """Overrides and config of a trial, with its batch halved as often as the values say."""
    overrides = space.overrides(config)
    cfg = job.compose(overrides, number, sweep_dir)
    if halvings := config.get(HALVINGS, 0):
        overrides = shrink(overrides, cfg, halvings)
        cfg = job.compose(overrides, number, sweep_dir)
    return overrides, cfg


def check_shrinkable(cfg: DictConfig) -> None:
    """Check that a job has a batch size to halve, and a Trainer that can accumulate.

    Raises:
        ConfigError: It has not.
    """
    where = "hydra.sweeper.on_oom=retry_smaller"
    if batch_key(cfg) is None:
        raise ConfigError(
            f"{where}: the config has none of {', '.join(_BATCH_KEYS)}, so that there is nothing to"
            " halve. Give the batch size one of these keys, or set on_oom=fail."
        )
    if not isinstance(OmegaConf.select(cfg, "trainer"), DictConfig):
        raise ConfigError(
            f"{where}: the config has no node `trainer` for {_ACCUMULATION}. Give the Trainer's"
            " arguments there, or set on_oom=fail."
        )


def batch_key(cfg: DictConfig) -> str | None:
    """First known config key of the batch size; `None` if there is none."""
    for key in _BATCH_KEYS:
        if isinstance(OmegaConf.select(cfg, key), int):
            return key
    return None


def batch_size(cfg: DictConfig) -> int:
    """The batch size of a job; 1 where it has none."""
    key = batch_key(cfg)
    return 1 if key is None else int(OmegaConf.select(cfg, key))


def shrink(overrides: Sequence[str], cfg: DictConfig, halvings: int) -> list[str]:
    """Overrides for the same job with smaller batches, at least 1, and more accumulation."""
    key, factor = batch_key(cfg), 2**halvings
    if key is None:
        return list(overrides)
    accumulated = OmegaConf.select(cfg, _ACCUMULATION) or 1
    return _set(
        _set(overrides, key, max(1, batch_size(cfg) // factor)), _ACCUMULATION, accumulated * factor
    )


def _set(overrides: Sequence[str], key: str, value: int) -> list[str]:
    """Override `key`, replacing other overrides of it."""
    others = [o for o in overrides if o.lstrip("+").partition("=")[0] != key]
    return [*others, f"++{key}={value}"]  # whether the config has it by itself or not
