"""Searchers and schedulers, asked as Ray asks them; no Ray is started."""

import inspect
import logging
import pkgutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import hyperopt  # noqa: F401  (these set variables of the environment; no test's leak)
import optuna
import pytest
import sklearn.gaussian_process  # noqa: F401
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from hydra_plugins.ray_tune_sweeper import config as sweeper
from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.search.schedulers import build_scheduler
from lightning_mgpu.sweep.search.searchers import Trials, build_searcher
from lightning_mgpu.sweep.settings import options as options_module
from lightning_mgpu.sweep.settings.nodes import arguments_of, needs_checkpoints
from lightning_mgpu.sweep.settings.options import check_options, check_space
from lightning_mgpu.sweep.space.objectives import Objective, dominates, read_objectives
from lightning_mgpu.sweep.space.space import parse_space
from lightning_mgpu.sweep.store.records import FINAL

SEARCHES = {
    "random": sweeper.RandomConf,
    "grid": sweeper.GridConf,
    "optuna": sweeper.OptunaConf,
    "hyperopt": sweeper.HyperoptConf,
    "bohb": sweeper.BohbSearchConf,
}
SCHEDULERS = {
    "fifo": sweeper.FifoConf,
    "asha": sweeper.AshaConf,
    "hyperband": sweeper.HyperbandConf,
    "median": sweeper.MedianConf,
    "bohb": sweeper.BohbConf,
    "pbt": sweeper.PbtConf,
    "pb2": sweeper.Pb2Conf,
}
SPACE = parse_space(
    {},
    [
        *("lr=tag(log,interval(1e-4,1e-1))", "drop=interval(0,0.5)", "depth=int(interval(1,3))"),
        *("width=tag(log,int,interval(4,64))", "model.act=relu,tanh,'a b'", "db/engine=1,2"),
    ],
)
ONE = [Objective("m", "max")]
GRID = parse_space({}, ["a=1,2", "b=x,y"])


def options(
    search: str = "random", scheduler: str | None = None, **given: Any
) -> RayTuneSweeperConf:
    if scheduler is None:
        scheduler = "bohb" if search == "bohb" else "asha"
    return RayTuneSweeperConf(
        search_alg=SEARCHES[search](seed=0),
        scheduler=SCHEDULERS[scheduler](),
        **{"metric": "m", "mode": "max", **given},
    )


@pytest.mark.parametrize("search", ["random", "optuna", "hyperopt", "bohb"])
def test_searcher_suggests_values_of_the_space(search: str) -> None:
    searcher = build_searcher(options(search), SPACE, ONE)
    for number in range(30):
        values = searcher.suggest(str(number))
        assert set(values) == set(SPACE.dimensions)
        assert 1e-4 <= values["lr"] <= 1e-1
        assert 0 <= values["drop"] <= 0.5
        assert values["depth"] in (1, 2, 3)
        assert 4 <= values["width"] <= 64
        assert values["model.act"] in ("relu", "tanh", "a b")
        overrides = SPACE.overrides(values)
        again = parse_space({}, overrides).fixed  # they can be read as plain overrides
        assert again == overrides
        searcher.on_trial_result(str(number), {"m": values["lr"], "training_iteration": 1})
        searcher.on_trial_complete(str(number), {"m": values["lr"], "training_iteration": 1})


@pytest.mark.parametrize("search", ["random", "optuna", "hyperopt", "bohb"])
def test_same_seed_suggests_the_same(search: str) -> None:
    first, second = (build_searcher(options(search), SPACE, ONE) for _ in range(2))
    assert [first.suggest(str(n)) for n in range(5)] == [second.suggest(str(n)) for n in range(5)]


def sampled(sampler: Any, seed: int | None = None) -> RayTuneSweeperConf:
    return RayTuneSweeperConf(
        search_alg=sweeper.OptunaConf(sampler=sampler, seed=seed),
        scheduler=sweeper.AshaConf(),
        metric="m",
        mode="max",
    )


def test_optuna_takes_any_of_its_samplers() -> None:
    grid = {"a": [1, 2], "b": ["x", "y"]}
    given = sampled({"_target_": "optuna.samplers.GridSampler", "search_space": grid, "seed": 0})
    check_options(given)
    searcher = build_searcher(given, GRID, ONE)
    drawn = set()
    for number in range(4):
        drawn.add(tuple(searcher.suggest(str(number)).values()))
        searcher.on_trial_complete(str(number), {"m": 1.0, "training_iteration": 1})
    assert drawn == {(1, "x"), (1, "y"), (2, "x"), (2, "y")}


def test_random_reaches_both_ends_of_an_integer_interval() -> None:
    searcher = build_searcher(options(), SPACE, ONE)
    drawn = [searcher.suggest(str(number)) for number in range(300)]
    assert {values["depth"] for values in drawn} == {1, 2, 3}
    assert {4, 64} <= {values["width"] for values in drawn}


def test_grid_suggests_every_combination() -> None:
    searcher = build_searcher(options("grid", "fifo"), GRID, ONE)
    points = [tuple(searcher.suggest(str(number)).values()) for number in range(4)]
    assert points == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


@pytest.mark.parametrize("search", ["random", "grid", "optuna", "hyperopt", "bohb"])
def test_searcher_goes_on_where_it_was_saved(search: str, tmp_path: Path) -> None:
    space = GRID if search == "grid" else SPACE
    first, second = (build_searcher(options(search), space, ONE) for _ in range(2))
    for number in range(2):
        values = first.suggest(str(number))
        first.on_trial_complete(str(number), {"m": 1.0 + number, "training_iteration": 1})
    first.save(str(tmp_path / "state"))
    second.restore(str(tmp_path / "state"))
    values = second.suggest("2")
    assert values == first.suggest("2")


@pytest.mark.parametrize(
    ("metric", "mode", "expected"),
    [
        ("a", "max", ["a max"]),
        (["a"], ["max"], ["a max"]),
        (["a", "b"], "min", ["a min", "b min"]),
        (["a", "b"], ["min", "max"], ["a min", "b max"]),
        (None, "min", ["objective min"]),
        (None, ["min", "max"], ["objective_0 min", "objective_1 max"]),
    ],
)
def test_objectives_are_read(metric: Any, mode: Any, expected: list[str]) -> None:
    read = read_objectives(options("random", "fifo", metric=metric, mode=mode))
    assert list(map(" ".join, read)) == expected


@pytest.mark.parametrize(
    ("other", "expected"), [([3, 5], True), ([2, 4], True), ([2, 5], False), ([3, 6], False)]
)
def test_better_is_what_is_nowhere_worse(other: list[float], expected: bool) -> None:
    assert dominates([2, 5], other, ["min", "max"]) is expected


def test_several_objectives_reach_optuna() -> None:
    several = [Objective("a", "min"), Objective("b", "max")]
    searcher = build_searcher(options("optuna", "fifo"), SPACE, several)
    trials = Trials(searcher, 3, several, takes_best=False)
    for number in range(12):  # more than it draws at random
        searcher.suggest(str(number))
        trials.on_trial_result(str(number), {"a": 1.0, "b": 2.0})
        searcher.on_trial_complete(str(number), {"a": 1.0 - number, "b": 2.0 + number})
    study = searcher._ot_study  # type: ignore[attr-defined]
    assert [trial.values for trial in study.best_trials] == [[-10.0, 13.0]]
    assert trials.metric == ["a", "b"]


class Listening(Searcher):
    """A searcher that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(metric="m", mode="max")
        self.told: list[Any] = []

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        self.told.append(result["m"])

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.told.append(result["m"])


@pytest.mark.parametrize(
    ("mode", "takes_best", "last", "expected"),
    [
        ("max", True, 2.0, [1.0, 3.0, 3.0, 3.0]),
        ("min", True, 2.0, [1.0, 1.0, 1.0, 1.0]),
        ("max", False, 2.0, [1.0, 3.0, 2.0, 2.0]),
        ("max", True, 4.0, [1.0, 3.0, 3.0, 4.0]),  # with which the scheduler has stopped it
    ],
)
def test_searcher_learns_what_a_run_is_worth(
    mode: str, takes_best: bool, last: float, expected: list[float]
) -> None:
    searcher = Listening()
    trials = Trials(searcher, 3, [Objective("m", mode)], takes_best)
    for value in (1.0, 3.0, 2.0):
        trials.on_trial_result("a", {"m": value})
    trials.on_trial_complete("a", {"m": last})
    assert searcher.told == expected


def test_searcher_forgets_the_runs_before_what_is_final() -> None:
    searcher = Listening()
    trials = Trials(searcher, 3, [Objective("m", "max")], takes_best=True)
    trials.on_trial_result("a", {"m": 3.0})
    trials.on_trial_result("a", {"m": 1.0, FINAL: True})
    trials.on_trial_complete("a", {"m": 1.0, FINAL: True})
    assert searcher.told == [3.0, 1.0, 1.0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_is_built_with_its_defaults(scheduler: str) -> None:
    given = options("bohb" if scheduler == "bohb" else "random", scheduler)
    check_options(given)
    built = build_scheduler(given, SPACE)
    assert scheduler == "fifo" or built.set_search_properties("m", "max")


_GIVEN = {"metric", "mode", "space", "objective", "random_state_seed", "hyperparam_bounds"}
# Of objects that no config holds: `storage` is made of a URL.
_GIVEN |= {"study_name", "storage"}


@pytest.mark.parametrize("conf", [*SEARCHES.values(), *SCHEDULERS.values()])
def test_every_argument_of_the_class_is_an_option(conf: Any) -> None:
    node = conf()
    takes = set(inspect.signature(pkgutil.resolve_name(node._target_)).parameters)
    missing = takes - _GIVEN - arguments_of(node).keys()
    # (By name: tests of how plugins are found import the module anew.)
    assert missing <= ({"time_attr"} if conf.__name__ == "BohbSearchConf" else set())


class Patient(ASHAScheduler):
    """Another scheduler of a user's."""

    def __init__(self, grace_period: int = 7, max_t: int = 9) -> None:
        super().__init__(grace_period=grace_period, max_t=max_t)


class Odd(Searcher):
    """A searcher of a user's, which keeps what it is told of the search."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.told: list[Any] = []

    def set_search_properties(self, *given: Any, **_: Any) -> bool:
        self.told = list(given)
        return True


def with_nodes(search: dict[str, Any], scheduler: dict[str, Any]) -> RayTuneSweeperConf:
    return RayTuneSweeperConf(
        search_alg=sweeper.adopt(search, "odd"),
        scheduler=sweeper.adopt(scheduler, None),
        metric="m",
        mode="max",
    )


RANDOM = vars(sweeper.RandomConf())
FIFO = vars(sweeper.FifoConf())


def test_classes_of_a_user_are_made_and_told_of_the_search() -> None:
    given = with_nodes(
        {"_target_": f"{__name__}.Odd", "width": 3},
        {"_target_": f"{__name__}.Patient", "grace_period": 2},
    )
    check_options(given)
    assert (given.search_alg.name, given.scheduler.name) == ("odd", "Patient")
    searcher: Any = build_searcher(given, GRID, ONE)
    assert (searcher.width, searcher.told[:2]) == (3, ["m", "max"])
    assert list(searcher.told[2]) == ["a", "b"]
    scheduler = build_scheduler(given, SPACE)
    assert isinstance(scheduler, Patient)
    assert TrialScheduler.STOP not in _decisions(scheduler, 20)  # it is one of ASHA's kind
    assert not needs_checkpoints(given)


@pytest.mark.parametrize(
    ("search", "scheduler", "message"),
    [
        (RANDOM, {"_target_": "no.Such"}, r"scheduler\._target_=no\.Such: cannot be imported"),
        (RANDOM, {"_target_": "builtins.dict"}, r"scheduler\._target_=builtins\.dict: is no"),
        ({"_target_": "builtins.dict"}, FIFO, r"search_alg\._target_=builtins\.dict: is no"),
        (RANDOM, {**FIFO, "max_t": 3}, r"scheduler\.max_t=3: .*FIFOScheduler takes nothing"),
        (
            RANDOM,
            {"_target_": f"{__name__}.Patient", "grace_perod": 2},
            r"scheduler\.grace_perod=2: .*Patient takes grace_period, max_t\. Did you mean grace_p",
        ),
        (
            {"_target_": f"{__name__}.Odd"},
            FIFO,
            r"search_alg: .*Odd\(\) is refused, TypeError: .*'width'",
        ),
        (
            {**vars(sweeper.OptunaConf()), "sampler": {"_target_": "optuna.samplers.TPESampler"}}
            | {"points_to_evaluate": [{"a": 1}]},
            FIFO,
            r"OptunaSearch\(.*\) is refused, ValueError: Dim of point",
        ),
    ],
)
def test_nodes_that_cannot_work_are_refused(
    search: dict[str, Any], scheduler: dict[str, Any], message: str
) -> None:
    def refuse(given: RayTuneSweeperConf) -> None:
        check_options(given)
        build_searcher(given, GRID, ONE)
        build_scheduler(given, GRID)

    with pytest.raises(ConfigError, match=message):
        refuse(with_nodes(search, scheduler))


def _decisions(scheduler: TrialScheduler, reports: int) -> list[str]:
    """Of a trial that nobody else is better than."""
    scheduler.set_search_properties("m", "max")
    controller, trial = MagicMock(), Trial("trainable", stub=True)
    trial.set_status(Trial.RUNNING)
    scheduler.on_trial_add(controller, trial)
    return [
        scheduler.on_trial_result(controller, trial, {"training_iteration": number, "m": 1.0})
        for number in range(1, reports + 1)
    ]


@pytest.mark.parametrize(
    ("name", "reports"), [("asha", None), ("hyperband", None), ("hyperband", 9)]
)
def test_scheduler_leaves_the_end_of_the_best_trial_to_its_trainer(
    name: str, reports: int | None
) -> None:
    decisions = _decisions(build_scheduler(options("random", name), SPACE, reports), 300)
    assert TrialScheduler.STOP not in decisions
    assert decisions[-1] == TrialScheduler.CONTINUE


@pytest.mark.parametrize("kind", [sweeper.AshaConf, sweeper.HyperbandConf])
def test_trial_ends_where_it_is_told_to(kind: type) -> None:
    given = options("random", kind().name)
    given.scheduler = kind(max_t=9)
    assert _decisions(build_scheduler(given, SPACE, 300), 9)[-1] == TrialScheduler.STOP


def test_hyperband_says_how_far_it_compares(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    build_scheduler(options("random", "hyperband"), SPACE, 20)
    assert not caplog.records
    build_scheduler(options("random", "hyperband"), SPACE)
    assert "hyperband compares trials up to report 81" in caplog.text


def test_options_reach_the_scheduler() -> None:
    given = options()
    given.scheduler = sweeper.AshaConf(max_t=9, grace_period=2, reduction_factor=3)
    built = build_scheduler(given, SPACE)
    assert built._max_t == 9  # type: ignore[attr-defined]


def test_population_mutates_what_is_asked_within_bounds() -> None:
    given = options("random", "pbt")
    given.scheduler = sweeper.PbtConf(hyperparam_mutations=["lr"], perturbation_factors=[9, 9])
    built: Any = build_scheduler(given, SPACE)
    assert list(built._hyperparam_mutations) == ["lr"]
    values = {"lr": 0.9, "drop": -0.1, "depth": 7.2, "width": 5, "model.act": "relu"}
    clipped = built._custom_explore_fn({**values, "db:engine": 1})
    assert (clipped["lr"], clipped["drop"], clipped["depth"]) == (0.1, 0.0, 3)


def test_only_schedulers_that_pause_need_checkpoints() -> None:
    needing = {name for name in SCHEDULERS if needs_checkpoints(options("random", name))}
    assert needing == {"hyperband", "bohb", "median", "pbt", "pb2"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (options("bohb", "asha"), "search_alg=bohb .*scheduler=asha: BOHB needs both"),
        (options("random", "bohb"), "search_alg=random .*scheduler=bohb: BOHB needs both"),
        (options("optuna", "pbt"), "the scheduler itself changes the values"),
        (options("hyperopt", "pb2"), "the scheduler itself changes the values"),
        (options("random", "pbt", metric=None), r"scheduler=pbt: .*hydra\.sweeper\.metric"),
        (options(mode="maximize"), "mode=maximize: expected one of min, max"),
        (options(mode=["min", "most"]), r"mode=\[min,most\]: expected one of min, max"),
        (options(mode=["min", "max"]), r"mode=\[min,max\]: 2 for 1 metrics .*metric=m"),
        (options(metric=["a", "a"]), r"metric=\[a,a\]: expected .* a list of different ones"),
        (options(metric=["a", "b"]), "scheduler=asha: compares .*scheduler=fifo"),
        (options("hyperopt", "fifo", metric=["a", "b"]), "search_alg=hyperopt: optimises one"),
        (options("bohb", "bohb", metric=["a", "b"]), "search_alg=bohb: optimises one"),
        (options("random", "pbt", metric=["a", "b"]), "scheduler=pbt: compares trials by one"),
        (options(report="first"), "report=first: expected one of best, last, false"),
        (options(num_samples=0), "num_samples=0: expected a number above 0"),
        (options(max_failures=-1), "max_failures=-1: expected 0 or more"),
        (options(max_failure_rate=2.0), "max_failure_rate=2.0: expected a share"),
        (options(keep_checkpoints=-1), "keep_checkpoints=-1: expected 0 or more"),
        (sampled(5), "sampler=5: expected _target_"),
        (sampled({"seed": 1}), r"sampler=\{seed:1\}: expected _target_, such as optuna"),
        (sampled({"_target_": "a"}, seed=1), r"A seed is one of them, and takes the place of"),
    ],
)
def test_what_cannot_work_is_refused(given: RayTuneSweeperConf, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(given)


@pytest.mark.parametrize(
    ("search", "scheduler", "package", "extra"),
    [
        ("optuna", "asha", "optuna", "search"),
        ("hyperopt", "asha", "hyperopt", "search"),
        ("random", "pb2", "sklearn", "search"),
        ("random", "asha", "ray", "ray"),
    ],
)
def test_missing_package_is_named(search: str, scheduler: str, package: str, extra: str) -> None:
    def find_spec(name: str) -> object:
        return None if name == package else object()

    with (
        patch.object(options_module, "find_spec", find_spec),
        pytest.raises(ConfigError, match=rf"pip install 'lightning_mgpu\[{extra}\]'"),
    ):
        check_options(options(search, scheduler))


@pytest.mark.parametrize(
    ("release", "is_old"), [("2.10.1", True), ("3.6.0", True), ("4.0.0", False)]
)
def test_optuna_of_another_age_is_refused(release: str, is_old: bool) -> None:
    """As hydra-optuna-sweeper needs it."""
    message = r"hydra/sweeper/search_alg=optuna: needs optuna>=4, and [23]\.[0-9.]* is installed"
    with (
        patch.object(options_module, "version", lambda package: release),
        pytest.raises(ConfigError, match=message) if is_old else nullcontext(),
    ):
        check_options(options("optuna"))


def test_lists_among_choices_are_refused_where_they_cannot_be() -> None:
    space = parse_space({}, ["sizes=choice([1,2],[3])"])
    for search in ("random", "bohb"):
        check_space(options(search), space)
    with pytest.raises(ConfigError, match=r"sizes=\[1,2\]: hydra/sweeper/search_alg=optuna"):
        check_space(options("optuna"), space)


def test_mutation_of_what_is_not_searched_is_refused() -> None:
    given = options("random", "pbt")
    given.scheduler = sweeper.PbtConf(hyperparam_mutations=["lrr"])
    with pytest.raises(ConfigError, match=r"lrr is not searched\. Searched are: a, b"):
        check_space(given, GRID)


def test_bandits_without_an_interval_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs at least one interval"):
        check_space(options("random", "pb2"), GRID)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
