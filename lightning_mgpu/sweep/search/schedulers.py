"""Build Ray Tune's schedulers, which stop trials early or copy others' checkpoints."""

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from ray.tune import schedulers

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.settings.nodes import SCHEDULER, build, is_kind, target_of
from lightning_mgpu.sweep.space.domains import to_domain
from lightning_mgpu.sweep.space.space import Choice, Interval, Space

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

log = logging.getLogger(__name__)

_FOREVER = 10**18  # of whatever `time_attr` counts: two dozen rungs more
_REPORTS = 81  # as Ray's default
_ASYNCHRONOUS = ("ASHAScheduler", "AsyncHyperBandScheduler")
_WITH_END = (*_ASYNCHRONOUS, "HyperBandScheduler", "HyperBandForBOHB")


def build_scheduler(
    options: "RayTuneSweeperConf", space: Space, reports: int | None = None
) -> schedulers.TrialScheduler:
    """Ray's scheduler with the options of its config; Ray sets metric and mode.

    Without `max_t`, none ends a trial that the Trainer would go on with, unless others are better.

    Args:
        options: The sweep's.
        space: What is searched.
        reports: How many reports a whole trial makes; `None` if that is unknown.

    Raises:
        ConfigError: The class refuses its arguments.
    """
    conf = options.scheduler
    if options.metric is None:
        return schedulers.FIFOScheduler()
    written = dict(vars(conf))
    if is_kind(conf, "PB2"):  # which takes bounds for them
        written.pop("hyperparam_mutations", None)
    given = _given(conf, space, reports)
    built = build(SCHEDULER, SimpleNamespace(**written), **given)
    if not isinstance(built, schedulers.TrialScheduler):
        raise ConfigError(
            f"{SCHEDULER}._target_={target_of(conf)}: is no TrialScheduler of Ray Tune's."
        )
    return built


def _given(conf: Any, space: Space, reports: int | None) -> dict[str, Any]:
    """Arguments that depend on the space or on how long a trial is."""
    if is_kind(conf, "PB2"):
        return _pb2(conf, space)
    if is_kind(conf, "PopulationBasedTraining"):
        return _pbt(conf, space)
    if is_kind(conf, *_WITH_END) and getattr(conf, "max_t", None) is None:
        return _open_end(conf, reports)
    given = getattr(conf, "stop_last_trials", True)
    return {"stop_last_trials": True} if given is None else {}


def _open_end(conf: Any, reports: int | None) -> dict[str, Any]:
    """Arguments of a scheduler whose best trials go on to their own end."""
    if is_kind(conf, *_ASYNCHRONOUS):
        return {"max_t": _FOREVER}
    if reports is None:  # HyperBand needs to know how often it can halve
        log.info(
            "The config has no trainer.max_epochs and hydra.sweeper.scheduler.max_t is not set:"
            " %s compares trials up to report %d, and the best of each bracket go on.",
            conf.name,
            _REPORTS,
        )
    given = getattr(conf, "stop_last_trials", None)
    return {"max_t": reports or _REPORTS, "stop_last_trials": bool(given)}


def _pbt(conf: Any, space: Space) -> dict[str, Any]:
    return {
        "hyperparam_mutations": {name: _mutations(space, name) for name in _names(conf, space)},
        "perturbation_factors": tuple(getattr(conf, "perturbation_factors", (1.2, 0.8))),
        "custom_explore_fn": _Clip(space, _own_explore(conf)),
    }


def _pb2(conf: Any, space: Space) -> dict[str, Any]:
    intervals = {name: space.dimensions[name] for name in _names(conf, space)}
    bounds = {
        name: [float(d.low), float(d.high)]
        for name, d in intervals.items()
        if isinstance(d, Interval)
    }
    return {"hyperparam_bounds": bounds, "custom_explore_fn": _Clip(space, _own_explore(conf))}


def _names(conf: Any, space: Space) -> list[str]:
    names = getattr(conf, "hyperparam_mutations", None)
    return list(space.dimensions) if names is None else [name.replace("/", ":") for name in names]


def _own_explore(conf: Any) -> Any:
    node = getattr(conf, "custom_explore_fn", None)
    return instantiate(node) if isinstance(node, dict) else node


def _mutations(space: Space, name: str) -> Any:
    dimension = space.dimensions[name]
    return list(dimension.values) if isinstance(dimension, Choice) else to_domain(dimension)


class _Clip:
    """Clip mutated values to their intervals, after the user's own function."""

    def __init__(self, space: Space, before: Any = None) -> None:
        self._space, self._before = space, before

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        if self._before is not None:
            config = self._before(config)
        for name, dimension in self._space.dimensions.items():
            if isinstance(dimension, Interval):
                value = min(max(config[name], dimension.low), dimension.high)
                config[name] = round(value) if dimension.integer else float(value)
        return config
