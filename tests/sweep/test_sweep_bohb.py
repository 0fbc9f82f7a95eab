"""BOHB's model and its searcher; no Ray is started."""

import pickle
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import HyperBandForBOHB

from lightning_mgpu.sweep.search.bohb import BohbModel
from lightning_mgpu.sweep.search.bohb_searcher import BohbSearcher
from lightning_mgpu.sweep.search.searchers import Trials
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.space.space import Choice, parse_space

SPACE = parse_space(
    {},
    [
        *("lr=tag(log,interval(1e-5,1))", "drop=interval(0,1)", "depth=int(interval(1,8))"),
        *("width=tag(log,int,interval(4,1024))", "act=relu,tanh,gelu", "sizes=choice([1],[2,3])"),
    ],
)
Values = dict[str, Any]


def loss(values: Values) -> float:
    """Least (0) at lr=1e-3, drop=0.2, depth=6, width=128 with gelu and one size."""
    return float(
        (np.log10(values["lr"]) + 3) ** 2
        + 4 * (values["drop"] - 0.2) ** 2
        + (values["depth"] - 6) ** 2 / 16
        + np.log2(values["width"] / 128) ** 2 / 9
        + (values["act"] != "gelu")
        + (len(values["sizes"]) - 1)
    )


def switched(values: Values) -> float:
    """Which number counts depends on the choice: `drop` with relu, `lr` with the others."""
    if values["act"] == "relu":
        return 0.5 + abs(values["drop"] - 0.9)
    return 0.2 * (values["act"] != "gelu") + abs(float(np.log10(values["lr"])) + 4) / 4


def search(model: BohbModel, function: Callable[[Values], float], trials: range) -> list[Values]:
    proposed = []
    for trial in trials:
        proposed.append(model.propose(str(trial)))
        model.observe(str(trial), 1, function(proposed[-1]))
    return proposed


def draws(seed: int, count: int) -> list[Values]:
    """Of a model that learns nothing."""
    model = BohbModel(SPACE.dimensions, seed)
    return [model.propose(str(trial)) for trial in range(count)]


@pytest.mark.parametrize("function", [loss, switched])
def test_model_finds_what_random_search_does_not(function: Callable[[Values], float]) -> None:
    """The best of 80, over ten seeds."""
    ours, random = [], []
    for seed in range(10):
        found = search(BohbModel(SPACE.dimensions, seed), function, range(80))
        ours.append(min(map(function, found)))
        random.append(min(map(function, draws(seed, 80))))
    assert median(ours) < 0.6 * median(random)
    assert mean(ours) < 0.7 * mean(random)


def test_model_proposes_values_of_the_space() -> None:
    proposed = search(BohbModel(SPACE.dimensions, 0), loss, range(120))
    for values in proposed:
        assert list(values) == list(SPACE.dimensions)
        assert 1e-5 <= values["lr"] <= 1
        assert 0 <= values["drop"] <= 1
        assert values["depth"] in range(1, 9)
        assert values["width"] in range(4, 1025)
        overrides = SPACE.overrides(values)
        assert parse_space({}, overrides).fixed == overrides
    for name in ("act", "sizes"):
        dimension = SPACE.dimensions[name]
        assert isinstance(dimension, Choice)
        assert all(values[name] in dimension.values for values in proposed)


def test_random_proposals_reach_both_ends() -> None:
    proposed = draws(0, 300)
    assert {values["depth"] for values in proposed} == set(range(1, 9))
    assert {1, 2} == {len(values["sizes"]) for values in proposed}
    assert min(values["width"] for values in proposed) < 8
    assert max(values["width"] for values in proposed) > 512


def test_third_of_the_proposals_is_random() -> None:
    space = parse_space({}, ["a=interval(0,1)", "b=1,2,3,4"])

    def far(values: Values) -> float:
        return float(values["a"] + (values["b"] > 1))

    proposed = search(BohbModel(space.dimensions, 0), far, range(400))[100:]
    share = mean(values["b"] > 1 for values in proposed)
    assert share == pytest.approx(0.75 / 3, abs=0.1)


def test_choices_of_a_single_value_are_no_trouble() -> None:
    space = parse_space({}, ["a=interval(0,1)", "b=choice(7)"])
    proposed = search(BohbModel(space.dimensions, 0), lambda values: values["a"], range(40))
    assert {values["b"] for values in proposed} == {7}


def test_largest_budget_with_enough_points_is_modelled() -> None:
    """One budget likes small values, the larger one large ones."""
    space = parse_space({}, ["a=interval(0,1)"])
    model = BohbModel(space.dimensions, 0)
    for number in range(40):
        value = model.propose(str(number))["a"]
        model.observe(str(number), 1, value)
    low = [model.propose(f"low-{number}")["a"] for number in range(60)]
    values = {f"{number}": model.propose(f"{number}")["a"] for number in range(40, 60)}
    for trial, value in values.items():
        model.observe(trial, 9, -value)
    high = [model.propose(f"high-{number}")["a"] for number in range(60)]
    assert median(low) < 0.3
    assert median(high) > 0.7


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), float("-inf")])
def test_what_fails_is_bad(bad: float | None) -> None:
    """At every budget: those that do not fail say nothing about `a`."""
    space = parse_space({}, ["a=interval(0,1)", "b=interval(0,1)"])
    model = BohbModel(space.dimensions, 0)
    for number in range(80):
        trial = str(number)
        values = model.propose(trial)
        if values["a"] > 0.3 and bad is None:
            model.fail(trial)
        else:
            model.observe(trial, 3, 1.0 if values["a"] <= 0.3 else float(bad or 0))
    proposed = [model.propose(f"next-{number}")["a"] for number in range(60)]
    assert median(proposed) < 0.3


def test_trial_that_was_tried_again_is_no_failure() -> None:
    space = parse_space({}, ["a=interval(0,1)"])
    first, second = (BohbModel(space.dimensions, 0) for _ in range(2))
    for number in range(20):
        values = [model.propose(str(number)) for model in (first, second)]
        first.fail(str(number))
        for model in (first, second):
            model.observe(str(number), 1, values[0]["a"])
        assert values[0] == values[1]


def test_trial_of_nobody_is_ignored() -> None:
    first, second = (BohbModel(SPACE.dimensions, 0) for _ in range(2))
    first.observe("another", 1, 0.0)
    first.fail("one more")
    assert search(first, loss, range(30)) == search(second, loss, range(30))


def test_same_seed_proposes_the_same() -> None:
    first, second, other = (BohbModel(SPACE.dimensions, seed) for seed in (1, 1, 2))
    proposed = search(first, loss, range(40))
    assert proposed == search(second, loss, range(40))
    assert proposed != search(other, loss, range(40))


def test_model_goes_on_where_it_was_saved() -> None:
    first = BohbModel(SPACE.dimensions, 3)
    search(first, loss, range(40))
    second = pickle.loads(pickle.dumps(first))
    assert search(first, loss, range(40, 60)) == search(second, loss, range(40, 60))


def searcher(mode: str = "min") -> BohbSearcher:
    return BohbSearcher(Objective("m", mode), SPACE, 0, "training_iteration")


def suggested(searcher: BohbSearcher, trial: str) -> Values:
    values = searcher.suggest(trial)
    assert values is not None
    return values


def report(value: float, epoch: int, budget: int | None = None) -> dict[str, Any]:
    info = {} if budget is None else {"budget": budget}
    return {"m": value, "training_iteration": epoch, "hyperband_info": info}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("ends", [True, False])
def test_searcher_learns_at_rungs_and_at_ends(mode: str, ends: bool) -> None:
    """Of reports in between it learns nothing."""
    ours, sign = searcher(mode), -1 if mode == "max" else 1
    for number in range(60):
        value = sign * loss(suggested(ours, str(number)))
        ours.on_trial_result(str(number), report(-value, 1))
        if ends:
            ours.on_trial_complete(str(number), {"m": value, "training_iteration": 2})
        else:
            ours.on_trial_result(str(number), report(value, 2, budget=2))
            ours.on_trial_complete(str(number))  # stopped while it waits
    found = [loss(suggested(ours, f"next-{number}")) for number in range(40)]
    assert median(found) < median(map(loss, draws(0, 40))) / 2


def test_trials_that_wait_leave_their_places() -> None:
    ours = searcher()
    assert ours.set_max_concurrency(2)
    assert ours.suggest("a")
    assert ours.suggest("b")
    assert ours.suggest("c") is None
    ours.on_pause("a")
    ours.on_trial_result("a", report(1.0, 1, budget=1))  # as Ray does, after the scheduler
    assert ours.suggest("c")
    ours.on_unpause("a")
    ours.on_trial_complete("b", error=True)
    assert ours.suggest("d") is None
    ours.on_trial_complete("a", {"m": 1.0, "training_iteration": 3})
    assert ours.suggest("d")


def test_resumed_searcher_counts_those_that_run_again(tmp_path: Path) -> None:
    first, second = searcher(), searcher()
    for trial in ("a", "b"):
        first.suggest(trial)
    first.on_pause("a")
    first.on_trial_complete("b")
    first.save(str(tmp_path / "state"))
    second.restore(str(tmp_path / "state"))
    second.set_max_concurrency(1)
    assert second.suggest("c") is None
    second.on_trial_complete("a", {"m": 1.0, "training_iteration": 3})
    assert second.suggest("c")


def test_scheduler_of_ray_says_what_the_searcher_needs() -> None:
    """At which budget it has compared, and that a trial waits."""
    ours = searcher()
    ours.set_max_concurrency(1)
    scheduler = HyperBandForBOHB(max_t=4, reduction_factor=2)
    scheduler.set_search_properties("m", "min")
    controller, trial = MagicMock(), Trial("trainable", stub=True)
    controller.search_alg = Trials(ours, 3, [Objective("m", "min")], takes_best=False)
    trial.set_status(Trial.RUNNING)
    assert ours.suggest(trial.trial_id)
    scheduler.on_trial_add(controller, trial)
    result = {"m": 1.0, "training_iteration": 1}
    assert ours.suggest("b") is None
    assert scheduler.on_trial_result(controller, trial, result) == HyperBandForBOHB.PAUSE
    assert result["hyperband_info"] == {"budget": 1}
    assert ours.suggest("b")
