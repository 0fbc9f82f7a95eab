"""The sweeper's options, with the names that Ray uses."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

_DEFAULTS: list[Any] = [
    {"search_alg": "random"},
    {"scheduler": "asha"},
]
_SEARCH = "lightning_mgpu.sweep.search"


@dataclass
class SearchAlgConf:
    """Search algorithm, which chooses the values of the next trial.

    `_target_` is a class, and all but `name` are arguments of it. So it is with schedulers. Metric,
    mode and the search space are the sweep's.
    """

    _target_: str = MISSING
    name: str = MISSING  # null or missing: how the option is called


@dataclass
class RandomConf(SearchAlgConf):
    """Independent random values."""

    _target_: str = f"{_SEARCH}.searchers.RandomSearcher"
    name: str = "random"
    seed: int | None = None


@dataclass
class GridConf(SearchAlgConf):
    """Every combination, in order; `num_samples` cuts it short."""

    _target_: str = f"{_SEARCH}.searchers.GridSearcher"
    name: str = "grid"
    seed: int | None = None  # of no effect


@dataclass
class OptunaConf(SearchAlgConf):
    """Optuna's tree of Parzen estimators, or any other sampler of Optuna's."""

    _target_: str = "ray.tune.search.optuna.OptunaSearch"
    name: str = "optuna"
    seed: int | None = None
    # With `_target_`, such as optuna.samplers.TPESampler, and its arguments, its seed among them.
    sampler: Any = None
    points_to_evaluate: list[Any] | None = None  # values of the first trials, each a dict
    evaluated_rewards: list[Any] | None = None  # what those points are worth, if that is known


@dataclass
class HyperoptConf(SearchAlgConf):
    """HyperOpt's tree of Parzen estimators."""

    _target_: str = "ray.tune.search.hyperopt.HyperOptSearch"
    name: str = "hyperopt"
    seed: int | None = None  # its `random_state_seed`
    n_initial_points: int = 20
    gamma: float = 0.25
    points_to_evaluate: list[Any] | None = None


@dataclass
class BohbSearchConf(SearchAlgConf):
    """Bayesian optimisation; for ``scheduler=bohb`` alone."""

    _target_: str = f"{_SEARCH}.bohb_searcher.BohbSearcher"
    name: str = "bohb"
    seed: int | None = None


@dataclass
class SchedulerConf:
    """Scheduler, which decides which trials are stopped early."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class FifoConf(SchedulerConf):
    """No early stopping."""

    _target_: str = "ray.tune.schedulers.FIFOScheduler"
    name: str = "fifo"


@dataclass
class AshaConf(SchedulerConf):
    """Asynchronous successive halving: only the best go on at each rung."""

    _target_: str = "ray.tune.schedulers.ASHAScheduler"
    name: str = "asha"
    time_attr: str = "training_iteration"  # counts reports: epochs, unless validation is oftener
    max_t: int | None = None  # null: a trial that is good enough ends when its Trainer does
    grace_period: int = 1
    reduction_factor: float = 4
    brackets: int = 1
    stop_last_trials: bool = True  # at `max_t`


@dataclass
class HyperbandConf(SchedulerConf):
    """HyperBand: trials pause until their competitors have come as far."""

    _target_: str = "ray.tune.schedulers.HyperBandScheduler"
    name: str = "hyperband"
    time_attr: str = "training_iteration"
    max_t: int | None = None  # null: trainer.max_epochs, or 81; the best go on to their own end
    reduction_factor: float = 3
    stop_last_trials: bool | None = None  # at `max_t`; null: if that is set


@dataclass
class BohbConf(HyperbandConf):
    """HyperBand for ``search_alg=bohb``."""

    _target_: str = "ray.tune.schedulers.HyperBandForBOHB"
    name: str = "bohb"


@dataclass
class MedianConf(SchedulerConf):
    """Stop trials worse than the median of the others' running averages."""

    _target_: str = "ray.tune.schedulers.MedianStoppingRule"
    name: str = "median"
    time_attr: str = "training_iteration"
    grace_period: float = 1
    min_samples_required: int = 3
    min_time_slice: int = 0
    hard_stop: bool = True  # false: worse trials wait until there is room, and go on


@dataclass
class PopulationConf(SchedulerConf):
    """Options common to population-based schedulers: the worse copy the better, with new values."""

    time_attr: str = "training_iteration"
    perturbation_interval: float = 4
    quantile_fraction: float = 0.25
    # Which searched values may change within a run; null: all of them.
    hyperparam_mutations: list[str] | None = None
    log_config: bool = True
    require_attrs: bool = True
    synch: bool = False
    custom_explore_fn: Any = None  # {_target_: hydra.utils.get_method, path: module.function}


@dataclass
class PbtConf(PopulationConf):
    """Population-based training: values are drawn again, or made a little smaller or larger."""

    _target_: str = "ray.tune.schedulers.PopulationBasedTraining"
    name: str = "pbt"
    burn_in_period: float = 0
    resample_probability: float = 0.25
    perturbation_factors: list[float] = field(default_factory=lambda: [1.2, 0.8])


@dataclass
class Pb2Conf(PopulationConf):
    """Population-based bandits: new values from a model of how the old ones have done."""

    _target_: str = "ray.tune.schedulers.pb2.PB2"
    name: str = "pb2"


@dataclass
class ResourcesConf:
    """Resources reserved for each trial; fractions let trials share a device."""

    cpu: float = 1
    gpu: float | None = None  # null: 1 where there are GPUs, else 0; with 0 a trial sees none


@dataclass
class RayTuneSweeperConf:
    """``hydra.sweeper`` with ``hydra/sweeper=ray_tune``."""

    _target_: str = "hydra_plugins.ray_tune_sweeper.ray_tune_sweeper.RayTuneSweeper"
    _recursive_: bool = False  # Hydra makes the sweeper alone of it
    defaults: list[Any] = field(default_factory=lambda: list(_DEFAULTS))

    # What to search: keys and sweeps as on the command line, which wins.
    params: dict[str, Any] = field(default_factory=dict)
    # module.function(cfg, space) returns more of the space, or values computed from others.
    custom_search_space: str | None = None
    # Keys that exist only with some values of others: {momentum: {optimizer: [sgd, rmsprop]}}.
    conditions: Any = None  # no dict, to which the command line could add no key

    # What to optimise: a logged metric, or a list of them; null is what the job returns.
    metric: Any = None
    mode: Any = "min"  # min | max; a list with one for each metric
    # Which value of a run counts, best | last; false: the best, and no report at the end.
    report: Any = "best"
    every_n_epochs: int = 1

    # Nodes with the `_target_` and the arguments of a class: one of these here, or a file of yours.
    search_alg: Any = MISSING
    scheduler: Any = MISSING
    num_samples: int | None = None  # null: 10, or the whole grid
    max_concurrent_trials: int | None = None
    time_budget_s: float | None = None
    resources_per_trial: ResourcesConf = field(default_factory=ResourcesConf)
    reuse_actors: bool = True

    max_failures: int = 0  # how often a failed trial is tried again
    max_failure_rate: float = 1.0  # the sweep ends when more of its trials have failed
    # fail | retry_smaller: a trial that is out of memory runs again with half the batch size and
    # twice the accumulated batches, as long as there is something to halve.
    on_oom: str = "fail"
    keep_checkpoints: int = 0  # for each trial, beside those of the job itself

    # A database for Optuna's dashboard, such as sqlite:///sweep.db, with any search algorithm.
    optuna_storage: str | None = None
    resume: str | None = None  # the directory of a sweep that was interrupted
    # Arguments of ray.init; address=auto or host:port joins a cluster, ray://host:port sends the
    # sweep to one. null: RAY_ADDRESS, or a private Ray (local).
    ray: dict[str, Any] = field(
        default_factory=lambda: {
            "address": None,
            "runtime_env": {"working_dir": None},
            "num_cpus": None,
            "num_gpus": None,
        }
    )


def register() -> None:
    """Make the options known to Hydra."""
    store = ConfigStore.instance()
    store.store(
        group="hydra/sweeper", name="ray_tune", node=RayTuneSweeperConf, provider="ray_tune"
    )
    for group, nodes in (
        ("search_alg", (RandomConf, GridConf, OptunaConf, HyperoptConf, BohbSearchConf)),
        ("scheduler", (FifoConf, AshaConf, HyperbandConf, MedianConf, BohbConf, PbtConf, Pb2Conf)),
    ):
        for kind in nodes:
            node = OmegaConf.structured(kind)
            # Any argument may be given; the class itself says which it takes.
            OmegaConf.set_struct(node, False)
            store.store(
                group=f"hydra/sweeper/{group}", name=kind.name, node=node, provider="ray_tune"
            )


def adopt(conf: Any, name: str | None) -> Any:
    """Node of a search algorithm or scheduler, whether it is one of these here or a file's.

    Args:
        conf: An object of a class of this file, or a `dict`.
        name: What the option was set to.
    """
    node = SimpleNamespace(**conf) if isinstance(conf, dict) else conf
    if getattr(node, "name", MISSING) in (None, MISSING):
        node.name = name or str(getattr(node, "_target_", None)).rpartition(".")[2]
    return node


register()
