"""Refuses options that cannot work, before anything is started."""

from typing import TYPE_CHECKING

from lightning_mgpu.errors import ConfigError

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

__all__: list[str] = []

_WORDS = {"mode": ("min", "max"), "report": ("best", "last")}
_POSITIVE = ("num_samples", "max_concurrent_trials", "time_budget_s", "every_n_epochs")
_NOT_NEGATIVE = ("max_failures", "keep_checkpoints")
_NEED_A_METRIC = {"asha"}


def check_options(options: "RayTuneSweeperConf") -> None:
    """Check each option, and whether search and scheduler go together.

    Raises:
        ConfigError: The first that is wrong.
    """
    for name, words in _WORDS.items():
        if getattr(options, name) not in words:
            raise _wrong(options, name, f"one of {', '.join(words)}")
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise _wrong(options, name, "a number above 0, or null")
    for name in _NOT_NEGATIVE:
        if getattr(options, name) < 0:
            raise _wrong(options, name, "0 or more")
    if not 0 <= options.max_failure_rate <= 1:
        raise _wrong(options, "max_failure_rate", "a share from 0 to 1")


def stops_early(options: "RayTuneSweeperConf") -> bool:
    """Whether the scheduler lives on metrics reported while a trial runs."""
    return options.scheduler.name in _NEED_A_METRIC


def _wrong(options: "RayTuneSweeperConf", name: str, expected: str) -> ConfigError:
    return ConfigError(f"hydra.sweeper.{name}={getattr(options, name)}: expected {expected}.")
