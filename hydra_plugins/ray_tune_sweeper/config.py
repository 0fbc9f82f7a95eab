"""The sweeper's options, with the names that Ray uses."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

_DEFAULTS: list[Any] = [
    {"search_alg": "random"},
    {"scheduler": "asha"},
]


@dataclass
class SearchAlgConf:
    """Search algorithm, which chooses the values of the next trial."""

    name: str = "random"
    seed: int | None = None


@dataclass
class RandomConf(SearchAlgConf):
    """Independent random values."""


@dataclass
class GridConf(SearchAlgConf):
    """Every combination, in order; `num_samples` cuts it short."""

    name: str = "grid"


@dataclass
class OptunaConf(SearchAlgConf):
    """Optuna's tree of Parzen estimators, or any other sampler of Optuna's."""

    name: str = "optuna"
    # With `_target_`, such as optuna.samplers.TPESampler, and its arguments, its seed among them.
    sampler: Any = None


@dataclass
class HyperoptConf(SearchAlgConf):
    """HyperOpt's tree of Parzen estimators."""

    name: str = "hyperopt"
    n_initial_points: int = 20
    gamma: float = 0.25


@dataclass
class BohbSearchConf(SearchAlgConf):
    """Bayesian optimisation; for ``scheduler=bohb`` alone."""

    name: str = "bohb"


@dataclass
class SchedulerConf:
    """Scheduler, which decides which trials are stopped early."""

    name: str = "fifo"


@dataclass
class FifoConf(SchedulerConf):
    """No early stopping."""


@dataclass
class AshaConf(SchedulerConf):
    """Asynchronous successive halving: only the best go on at each rung."""

    name: str = "asha"
    time_attr: str = "training_iteration"  # counts reports: epochs, unless validation is oftener
    max_t: int | None = None  # null: a trial that is good enough ends when its Trainer does
    grace_period: int = 1
    reduction_factor: float = 4
    brackets: int = 1


@dataclass
class HyperbandConf(SchedulerConf):
    """HyperBand: trials pause until their competitors have come as far."""

    name: str = "hyperband"
    time_attr: str = "training_iteration"
    max_t: int | None = None  # null: trainer.max_epochs, or 81; the best go on to their own end
    reduction_factor: float = 3


@dataclass
class BohbConf(HyperbandConf):
    """HyperBand for ``search_alg=bohb``."""

    name: str = "bohb"


@dataclass
class MedianConf(SchedulerConf):
    """Stop trials worse than the median of the others' running averages."""

    name: str = "median"
    time_attr: str = "training_iteration"
    grace_period: float = 1
    min_samples_required: int = 3


@dataclass
class PopulationConf(SchedulerConf):
    """Options common to population-based schedulers: the worse copy the better, with new values."""

    time_attr: str = "training_iteration"
    perturbation_interval: float = 4
    quantile_fraction: float = 0.25
    # Which searched values may change within a run; null: all of them.
    hyperparam_mutations: list[str] | None = None


@dataclass
class PbtConf(PopulationConf):
    """Population-based training: values are drawn again, or made a little smaller or larger."""

    name: str = "pbt"
    resample_probability: float = 0.25
    perturbation_factors: list[float] = field(default_factory=lambda: [1.2, 0.8])


@dataclass
class Pb2Conf(PopulationConf):
    """Population-based bandits: new values from a model of how the old ones have done."""

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

    search_alg: SearchAlgConf = MISSING
    scheduler: SchedulerConf = MISSING
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
        for node in nodes:
            store.store(
                group=f"hydra/sweeper/{group}", name=node.name, node=node, provider="ray_tune"
            )


register()
