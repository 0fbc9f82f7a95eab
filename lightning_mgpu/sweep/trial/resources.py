"""Resources that each trial reserves for itself, or for its workers on Ray."""

import contextlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from omegaconf import DictConfig
from ray.tune import PlacementGroupFactory

from lightning_mgpu.config.elsewhere import runs_elsewhere
from lightning_mgpu.config.namespace import follow_model
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray.cluster import describe
from lightning_mgpu.sweep.settings.nodes import is_population

if TYPE_CHECKING:
    from lightning_mgpu.sweep.settings.prepared import PreparedSweep

_STRATEGY = "strategy"


class Requests:
    """Resources of each trial of a sweep, by its values.

    Args:
        sweep: The sweep.

    Attributes:
        hides_gpus: Whether no trial has a GPU of its own, so that none may be seen.
    """

    def __init__(self, sweep: "PreparedSweep") -> None:
        self._sweep = sweep
        options = sweep.options.resources_per_trial
        gpu = options.gpu
        if gpu is None:
            gpu = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        self._own = {"CPU": options.cpu, "GPU": gpu}
        self.hides_gpus = gpu == 0

    def of(self, values: Mapping[str, Any]) -> PlacementGroupFactory:
        """Resources of the trial with these values."""
        return self._factory(self._bundles(self._sweep.space.overrides(values)))

    def check(self) -> None:
        """Check that every trial can start, whatever its strategy and number of workers.

        Raises:
            ConfigError: There is too little for it, its strategy cannot be built, or trials would
                outgrow what they reserve.
        """
        there = ray.cluster_resources()
        for overrides in self._sweep.space.examples(_STRATEGY):
            self._check(overrides, there)

    def _check(self, overrides: list[str], there: Mapping[str, float]) -> None:
        bundles = self._bundles(overrides)
        wanted, on_ray = self._factory(bundles).required_resources, bool(bundles)
        for name, amount in wanted.items():
            if amount > there.get(name, 0):
                raise ConfigError(
                    f"strategy: the workers of a trial need {describe(wanted)}, but there are"
                    f" {describe(there)}. Ask for fewer or smaller ones (strategy.num_workers,"
                    " strategy.num_cpus_per_worker), or join a cluster with"
                    " hydra.sweeper.ray.address."
                    if on_ray
                    else f"hydra.sweeper.resources_per_trial.{name.lower()}={amount:g}: there"
                    f" are {there.get(name, 0):g}. Ask for less, or join a cluster with"
                    " hydra.sweeper.ray.address."
                )
        if on_ray:
            self.hides_gpus = False  # it asks Lightning for the GPUs that its workers have
            self._refuse_changes()

    def _refuse_changes(self) -> None:
        """Refuse changes in population-based training, where trials keep their first resources."""
        scheduler = self._sweep.options.scheduler
        if not is_population(self._sweep.options):
            return
        names = getattr(scheduler, "hyperparam_mutations", None) or self._sweep.space.dimensions
        for name in names:
            if name.split(".")[0] == _STRATEGY:
                raise ConfigError(
                    f"hydra/sweeper/scheduler={scheduler.name}: {name} cannot change within a run,"
                    " which keeps its workers. Name the values that may:"
                    " hydra.sweeper.scheduler.hyperparam_mutations=[model.lr]."
                )

    def _factory(self, bundles: list[dict[str, float]]) -> PlacementGroupFactory:
        if not bundles:
            return PlacementGroupFactory([self._own])
        # The trial's own process only waits for its workers.
        return PlacementGroupFactory([{}, *bundles], strategy="PACK")

    def _bundles(self, overrides: list[str]) -> list[dict[str, float]]:
        """Bundles of a trial's workers; empty if its strategy has none on Ray."""
        cfg = self._sweep.job.compose_ahead(overrides, self._sweep.directory)
        if cfg.get(_STRATEGY) is not None:
            follow_model(cfg)
        if not _runs_on_ray(cfg.get(_STRATEGY)):
            return []
        from lightning_mgpu.config.build import build_node  # Lightning, which is loaded now

        bundles: list[dict[str, float]] = build_node(cfg, _STRATEGY).group().bundles
        return bundles


def _runs_on_ray(node: Any) -> bool:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    with contextlib.suppress(Exception):  # a node of somebody else's, or the trial will say
        return runs_elsewhere(pkgutil.resolve_name(str(node._target_)))
    return False


_requests: Requests | None = None


@contextlib.contextmanager
def requests_of(sweep: "PreparedSweep") -> Iterator[Requests]:
    """Make the trials of a sweep reserve their resources while the block lasts.

    Raises:
        ConfigError: There is too little for them.
    """
    global _requests
    requests = Requests(sweep)
    requests.check()
    _requests = requests
    try:
        yield requests
    finally:
        _requests = None


def request(values: Mapping[str, Any]) -> PlacementGroupFactory | None:
    """Resources of the trial with these values; known in the sweep's own process only."""
    return None if _requests is None else _requests.of(values)
