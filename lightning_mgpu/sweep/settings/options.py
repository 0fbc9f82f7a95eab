"""Refuse options that cannot work, before anything starts."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.settings.nodes import (
    check_nodes,
    is_kind,
    is_population,
    needs_checkpoints,
    stops_early,
)
from lightning_mgpu.sweep.space.objectives import read_objectives
from lightning_mgpu.sweep.space.space import Choice, Interval, Space, encode

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

_WORDS = {"report": ("best", "last", False), "on_oom": ("fail", "retry_smaller")}
_POSITIVE = ("num_samples", "max_concurrent_trials", "time_budget_s", "every_n_epochs")
_NOT_NEGATIVE = ("max_failures", "keep_checkpoints")
_OLDEST = {"optuna": 4}  # as in pyproject.toml
_NEEDS = {  # each search, the package it is made of and the extra with it
    "OptunaSearch": ("optuna", "search"),
    "HyperOptSearch": ("hyperopt", "search"),
}
_OF_ONE = ("HyperOptSearch", "BohbSearcher")
_FREE = ("RandomSearcher", "GridSearcher")  # learn nothing


def check_options(options: "RayTuneSweeperConf") -> None:
    """Check each option, and that search algorithm and scheduler go together.

    Raises:
        ConfigError: The first that is wrong.
    """
    for name, words in _WORDS.items():
        if getattr(options, name) not in words:
            raise _wrong(options, name, f"one of {', '.join(map(encode, words))}")
    objectives = read_objectives(options)
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise _wrong(options, name, "a number above 0, or null")
    for name in _NOT_NEGATIVE:
        if getattr(options, name) < 0:
            raise _wrong(options, name, "0 or more")
    if not 0 <= options.max_failure_rate <= 1:
        raise _wrong(options, "max_failure_rate", "a share from 0 to 1")
    _check_pair(options)
    if len(objectives) > 1:
        _check_several(options)
    _check_installed(options)
    sampler = getattr(options.search_alg, "sampler", None)
    is_node = isinstance(sampler, dict) and "_target_" in sampler
    has_seed = getattr(options.search_alg, "seed", None) is not None
    if sampler is not None and (not is_node or has_seed):
        raise ConfigError(
            f"hydra.sweeper.search_alg.sampler={encode(sampler)}: expected _target_, such as"
            " optuna.samplers.TPESampler, and that class's arguments. A seed is one of them, and"
            " takes the place of hydra.sweeper.search_alg.seed."
        )
    check_nodes(options)


def check_launcher(config: DictConfig) -> None:
    """Check that no launcher is asked for: trials are started by Ray.

    Raises:
        ConfigError: There is one.
    """
    if str(config.hydra.launcher.get("_target_", "")).endswith(".BasicLauncher"):
        return
    name = config.hydra.runtime.choices.get("hydra/launcher")
    raise ConfigError(
        f"hydra/launcher={name}: the trials of hydra/sweeper=ray_tune are started by Ray, not by a"
        " launcher. Set hydra/launcher=basic; hydra.sweeper.max_concurrent_trials says how many run"
        " at once, and hydra.sweeper.ray.address on which cluster."
    )


def check_space(options: "RayTuneSweeperConf", space: Space) -> None:
    """Check that search algorithm and scheduler support the search space."""
    search, scheduler = options.search_alg.name, options.scheduler
    for name, dimension in space.dimensions.items():
        if is_kind(options.search_alg, *_NEEDS) and isinstance(dimension, Choice):
            nested = [value for value in dimension.values if isinstance(value, (list, dict))]
            if nested:
                raise ConfigError(
                    f"{space.keys[name]}={encode(nested[0])}: hydra/sweeper/search_alg={search}"
                    " chooses among plain values only. Use hydra/sweeper/search_alg=random or grid,"
                    " or compute the list from a plain value by hydra.sweeper.custom_search_space."
                )
    if not is_population(options):
        return
    names = getattr(scheduler, "hyperparam_mutations", None)
    for name in names or ():
        if name.replace("/", ":") not in space.dimensions:
            raise ConfigError(
                f"hydra.sweeper.scheduler.hyperparam_mutations: {name} is not searched. Searched"
                f" are: {', '.join(space.dimensions)}."
            )
    mutable = [d for n, d in space.dimensions.items() if names is None or n in names]
    if is_kind(scheduler, "PB2") and not any(isinstance(d, Interval) for d in mutable):
        raise ConfigError(
            f"hydra/sweeper/scheduler={scheduler.name}: needs at least one interval to change."
        )


def _check_pair(options: "RayTuneSweeperConf") -> None:
    search, scheduler = options.search_alg.name, options.scheduler.name
    pair = f"hydra/sweeper/search_alg={search} hydra/sweeper/scheduler={scheduler}"
    is_bohb = is_kind(options.search_alg, "BohbSearcher")
    if is_bohb != is_kind(options.scheduler, "HyperBandForBOHB"):
        raise ConfigError(
            f"{pair}: BOHB needs both, hydra/sweeper/search_alg=bohb hydra/sweeper/scheduler=bohb."
        )
    if is_population(options) and not is_kind(options.search_alg, *_FREE):
        raise ConfigError(
            f"{pair}: the scheduler itself changes the values. Set"
            " hydra/sweeper/search_alg=random for the first ones."
        )
    if needs_checkpoints(options) and options.metric is None:
        raise ConfigError(
            f"hydra/sweeper/scheduler={scheduler}: compares trials while they run. Name the metric"
            " they log: hydra.sweeper.metric=val_loss hydra.sweeper.mode=min."
        )


def _check_several(options: "RayTuneSweeperConf") -> None:
    """Check that no option that needs a single metric is used with several."""
    search, scheduler = options.search_alg.name, options.scheduler.name
    if is_kind(options.search_alg, *_OF_ONE):
        raise ConfigError(
            f"hydra/sweeper/search_alg={search}: optimises one metric, not several. Use"
            " hydra/sweeper/search_alg=optuna, random, grid, or name one hydra.sweeper.metric."
        )
    if stops_early(options):
        raise ConfigError(
            f"hydra/sweeper/scheduler={scheduler}: compares trials by one metric, not by several."
            " Set hydra/sweeper/scheduler=fifo, or name one hydra.sweeper.metric."
        )


def _check_installed(options: "RayTuneSweeperConf") -> None:
    missing = []
    search = options.search_alg.name
    for kind, (package, extra) in _NEEDS.items():
        if not is_kind(options.search_alg, kind):
            continue
        if find_spec(package) is None:
            missing.append((f"sweeper/search_alg={search}", package, extra))
        elif package in _OLDEST:
            _check_release(package, extra, f"hydra/sweeper/search_alg={search}")
    if options.optuna_storage is not None and find_spec("optuna") is None:
        raise ConfigError(
            f"hydra.sweeper.optuna_storage={options.optuna_storage}: needs optuna: pip install"
            " 'lightning_mgpu[search]'."
        )
    if is_kind(options.scheduler, "PB2") and find_spec("sklearn") is None:
        missing.append((f"sweeper/scheduler={options.scheduler.name}", "scikit-learn", "search"))
    if find_spec("ray") is None:
        missing.append(("sweeper=ray_tune", "ray", "ray"))
    for choice, package, extra in missing:
        raise ConfigError(
            f"hydra/{choice}: needs {package}: pip install 'lightning_mgpu[{extra}]'."
        )


def _check_release(package: str, extra: str, choice: str) -> None:
    """Check that a package which is installed is not too old."""
    installed, oldest = version(package), _OLDEST[package]
    if int(installed.partition(".")[0]) < oldest:
        raise ConfigError(
            f"{choice}: needs {package}>={oldest}, and {installed} is installed: pip install"
            f" 'lightning_mgpu[{extra}]'. What needs the old one, such as hydra-optuna-sweeper,"
            " cannot be installed beside it."
        )


def _wrong(options: "RayTuneSweeperConf", name: str, expected: str) -> ConfigError:
    return ConfigError(f"hydra.sweeper.{name}={getattr(options, name)}: expected {expected}.")
