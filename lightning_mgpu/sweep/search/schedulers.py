"""Build Ray Tune's schedulers, which stop trials early or copy others' checkpoints."""

import logging
from typing import TYPE_CHECKING, Any

from ray.tune import schedulers

from lightning_mgpu.sweep.space.domains import to_domain
from lightning_mgpu.sweep.space.space import Choice, Interval, Space

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

log = logging.getLogger(__name__)

_FOREVER = 10**18  # of whatever `time_attr` counts: two dozen rungs more
_REPORTS = 81  # as Ray's default

_KINDS = {
    "asha": schedulers.ASHAScheduler,
    "hyperband": schedulers.HyperBandScheduler,
    "bohb": schedulers.HyperBandForBOHB,
    "median": schedulers.MedianStoppingRule,
}


def build_scheduler(
    options: "RayTuneSweeperConf", space: Space, reports: int | None = None
) -> schedulers.TrialScheduler:
    """Ray's scheduler with the options of its config; Ray sets metric and mode.

    Without `max_t`, none ends a trial that the Trainer would go on with, unless others are better.

    Args:
        options: The sweep's.
        space: What is searched.
        reports: How many reports a whole trial makes; `None` if that is unknown.
    """
    conf = options.scheduler
    given = {name: value for name, value in vars(conf).items() if name != "name"}
    if conf.name == "pbt":
        return _pbt(given, space)
    if conf.name == "pb2":
        return _pb2(given, space)
    if options.metric is None or conf.name == "fifo":
        return schedulers.FIFOScheduler()
    if "max_t" in given and given["max_t"] is None:
        given |= _open_end(conf.name, reports)
    scheduler: schedulers.TrialScheduler = _KINDS[conf.name](**given)
    return scheduler


def _open_end(name: str, reports: int | None) -> dict[str, Any]:
    """Arguments of a scheduler whose best trials go on to their own end."""
    if name == "asha":
        return {"max_t": _FOREVER}
    if reports is None:  # HyperBand needs to know how often it can halve
        log.info(
            "The config has no trainer.max_epochs and hydra.sweeper.scheduler.max_t is not set:"
            " %s compares trials up to report %d, and the best of each bracket go on.",
            name,
            _REPORTS,
        )
    return {"max_t": reports or _REPORTS, "stop_last_trials": False}


def _pbt(given: dict[str, Any], space: Space) -> schedulers.TrialScheduler:
    names = _pop_names(given, space)
    factors = tuple(given.pop("perturbation_factors"))
    return schedulers.PopulationBasedTraining(
        hyperparam_mutations={name: _mutations(space, name) for name in names},
        perturbation_factors=factors,
        custom_explore_fn=_Clip(space),
        **given,
    )


def _pb2(given: dict[str, Any], space: Space) -> schedulers.TrialScheduler:
    from ray.tune.schedulers.pb2 import PB2

    names = _pop_names(given, space)
    intervals = {name: space.dimensions[name] for name in names}
    bounds: Any = {
        name: [float(d.low), float(d.high)]
        for name, d in intervals.items()
        if isinstance(d, Interval)
    }
    return PB2(hyperparam_bounds=bounds, custom_explore_fn=_Clip(space), **given)


def _pop_names(given: dict[str, Any], space: Space) -> list[str]:
    names = given.pop("hyperparam_mutations")
    return list(space.dimensions) if names is None else [name.replace("/", ":") for name in names]


def _mutations(space: Space, name: str) -> Any:
    dimension = space.dimensions[name]
    return list(dimension.values) if isinstance(dimension, Choice) else to_domain(dimension)


class _Clip:
    """Clip mutated values to their intervals."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for name, dimension in self._space.dimensions.items():
            if isinstance(dimension, Interval):
                value = min(max(config[name], dimension.low), dimension.high)
                config[name] = round(value) if dimension.integer else float(value)
        return config
