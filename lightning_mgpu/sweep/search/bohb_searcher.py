"""BOHB as one of Ray Tune's searchers."""

import pickle
from typing import Any

from ray.tune.search import Searcher
from typing_extensions import override

from lightning_mgpu.sweep.search.bohb import BohbModel
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.space.space import Space


class BohbSearcher(Searcher):
    """Propose values by BOHB's model; for Ray's ``HyperBandForBOHB`` alone.

    That scheduler says of a result at which budget it was compared, and of a trial when it pauses
    for others: one that waits leaves its place to a new one.

    Args:
        objective: What is optimised.
        space: What is searched.
        seed: Of all draws.
        time_attr: What the scheduler counts, which is the budget of a trial that has ended.
    """

    def __init__(
        self,
        objective: Objective,
        space: Space,
        seed: int | None = None,
        time_attr: str = "training_iteration",
    ) -> None:
        super().__init__(metric=objective.name, mode=objective.mode)
        self._model = BohbModel(space.dimensions, seed)
        self._name, self._sign = objective.name, -1 if objective.mode == "max" else 1
        self._time_attr = time_attr
        self._live: set[str] = set()
        self._paused: set[str] = set()
        self._most: int | None = None

    @override
    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    @override
    def set_max_concurrency(self, max_concurrent: int) -> bool:
        self._most = max_concurrent
        return True

    @override
    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._most is not None and len(self._live - self._paused) >= self._most:
            return None
        self._live.add(trial_id)
        return self._model.propose(trial_id)

    @override
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._live.add(trial_id)
        budget = result.get("hyperband_info", {}).get("budget")
        if budget is not None:
            self._observe(trial_id, budget, result)

    @override
    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._live.discard(trial_id)
        self._paused.discard(trial_id)
        if error:
            self._model.fail(trial_id)
        elif result and self._name in result:  # stopped while it waited, it has none
            self._observe(trial_id, result[self._time_attr], result)

    def on_pause(self, trial_id: str) -> None:
        """Learn from the scheduler that a trial waits for others."""
        self._paused.add(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """Learn from the scheduler that a trial goes on."""
        self._paused.discard(trial_id)

    @override
    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump((self._model, self._live), file)

    @override
    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self._model, self._live = pickle.load(file)
        self._paused.clear()  # all that had not ended run again

    def _observe(self, trial_id: str, budget: float, result: dict[str, Any]) -> None:
        self._model.observe(trial_id, budget, self._sign * float(result[self._name]))
