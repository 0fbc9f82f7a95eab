"""Build search algorithms, which choose the values of the next trial."""

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.search import Searcher, SearchGenerator
from ray.tune.search.search_algorithm import SearchAlgorithm
from typing_extensions import override

from lightning_mgpu._compat import ray_tune
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.settings.nodes import SEARCH_ALG, build, is_kind, refused, target_of
from lightning_mgpu.sweep.space.domains import to_domains
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.space.space import Choice, Dimension, Interval, Space, enumerate_grid
from lightning_mgpu.sweep.store.records import FINAL

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf


def build_searcher(
    options: "RayTuneSweeperConf", space: Space, objectives: Sequence[Objective]
) -> Searcher:
    """Searcher that the options name, which knows space and objectives.

    Raises:
        ConfigError: The class refuses its arguments, or is no searcher.
    """
    conf, (first, *others) = options.search_alg, objectives
    if is_kind(conf, "RandomSearcher", "GridSearcher"):
        searcher = build(SEARCH_ALG, conf, metric=first.name, space=space)
    elif is_kind(conf, "BohbSearcher"):
        time_attr: str = vars(options.scheduler)["time_attr"]
        searcher = build(SEARCH_ALG, conf, objective=first, space=space, time_attr=time_attr)
    else:
        searcher = build(SEARCH_ALG, _translated(conf))
    if not isinstance(searcher, Searcher):
        raise ConfigError(f"{SEARCH_ALG}._target_={target_of(conf)}: is no Searcher of Ray Tune's.")
    metric: Any = [o.name for o in objectives] if others else first.name
    mode: Any = [o.mode for o in objectives] if others else first.mode
    with refused(SEARCH_ALG, conf):
        searcher.set_search_properties(metric, mode, to_domains(space))
    return searcher


def _translated(conf: Any) -> Any:
    """The node with the names of arguments that its class has."""
    given = {name: value for name, value in vars(conf).items() if value is not None}
    if "seed" in given and is_kind(conf, "HyperOptSearch"):
        given["random_state_seed"] = given.pop("seed")
    return SimpleNamespace(**given)


class Trials(SearchAlgorithm):
    """Ask a searcher for trials, and report each run's value to it.

    Not a `SearchGenerator` itself, since population-based schedulers refuse those.

    Args:
        num_samples: How many trials there are in all, of a resumed sweep too.
        objectives: What is optimised; each report of a trial must have all of it.
        takes_best: Whether a run is worth its best value, or its last.
    """

    def __init__(
        self,
        searcher: Searcher,
        num_samples: int,
        objectives: Sequence[Objective],
        takes_best: bool,
    ) -> None:
        self._generator = SearchGenerator(searcher)
        self._num_samples, self._takes_best = num_samples, takes_best
        self._names = [objective.name for objective in objectives]
        self._better = max if objectives[0].mode == "max" else min
        self._best: dict[str, float] = {}

    @property
    def searcher(self) -> Searcher:
        """The searcher; Ray's schedulers for BOHB tell it when trials pause."""
        return self._generator.searcher

    @property
    def metric(self) -> Any:  # a list, too, is what Ray checks reports by
        return self._names

    @property
    def total_samples(self) -> int:
        return self._num_samples

    @override
    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True  # searchers are made with them

    @override
    def add_configurations(self, experiments: Any) -> None:
        self._generator.add_configurations(experiments)

    @override
    def next_trial(self) -> Any:
        return self._generator.next_trial()

    @override
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._generator.on_trial_result(trial_id, self._so_far(trial_id, result))

    @override
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if result is not None:  # the report with which it was stopped comes here alone
            result = self._so_far(trial_id, result)
        self._best.pop(trial_id, None)
        self._generator.on_trial_complete(trial_id, result, error)

    def _so_far(self, trial_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """The result with what the run is worth up to it."""
        name = self._names[0]
        if not self._takes_best or name not in result:
            return result
        value = float(result[name])
        if result.get(FINAL):
            self._best.pop(trial_id, None)
        self._best[trial_id] = self._better(value, self._best.get(trial_id, value))
        return {**result, name: self._best[trial_id]}

    @override
    def is_finished(self) -> bool:
        finished: bool = self._generator.is_finished()
        return finished

    @override
    def set_finished(self) -> None:
        super().set_finished()  # type: ignore[no-untyped-call]
        self._generator.set_finished()

    @override
    def has_checkpoint(self, dirpath: str) -> bool:
        return bool(self._generator.has_checkpoint(dirpath))

    @override
    def save_to_dir(self, dirpath: str, session_str: str = "default", **_: Any) -> None:
        self._generator.save_to_dir(dirpath, session_str)

    @override
    def restore_from_dir(self, dirpath: str) -> None:
        self._generator.restore_from_dir(dirpath)
        # There may be more trials now than when the sweep was begun.
        ray_tune.set_samples(self._generator, self._num_samples)


class _Drawing(Searcher):
    """Base class of searchers that learn nothing and whose state is small."""

    def __init__(self, metric: str) -> None:
        super().__init__(metric=metric, mode="max")
        self._state: Any = None

    @override
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    @override
    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    @override
    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self._state, file)

    @override
    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self._state = pickle.load(file)


class RandomSearcher(_Drawing):
    """Draw each value independently."""

    def __init__(self, metric: str, space: Space, seed: int | None = None) -> None:
        super().__init__(metric)
        self._dimensions = space.dimensions
        self._state = np.random.default_rng(seed)

    @override
    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {name: _draw(d, self._state) for name, d in self._dimensions.items()}


class GridSearcher(_Drawing):
    """Every combination, in order, whatever the seed."""

    def __init__(self, metric: str, space: Space, seed: int | None = None) -> None:
        super().__init__(metric)
        self._points = enumerate_grid(space)
        self._state = 0  # how many were given out

    @override
    def suggest(self, trial_id: str) -> Any:
        self._state += 1
        return self._points[(self._state - 1) % len(self._points)]


def _draw(dimension: Dimension, generator: np.random.Generator) -> Any:
    if isinstance(dimension, Choice):
        return dimension.values[int(generator.integers(len(dimension.values)))]
    return _draw_number(dimension, generator)


def _draw_number(interval: Interval, generator: np.random.Generator) -> float:
    low, high = float(interval.low), float(interval.high)
    if interval.integer and not interval.log:
        return int(generator.integers(int(low), int(high) + 1))
    if not interval.log:
        return float(generator.uniform(low, high))
    # An integer's share of the logarithmic scale is from itself to the next one.
    drawn = np.exp(generator.uniform(np.log(low), np.log(high + interval.integer)))
    return min(int(drawn), int(high)) if interval.integer else float(np.clip(drawn, low, high))
