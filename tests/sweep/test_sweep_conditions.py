"""Keys that exist only with some values of others; no Ray is started."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hydra_plugins.ray_tune_sweeper import config as sweeper
from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.search.searchers import build_searcher
from lightning_mgpu.sweep.settings.extent import extent
from lightning_mgpu.sweep.space.conditions import add_conditions
from lightning_mgpu.sweep.space.custom import add_custom
from lightning_mgpu.sweep.space.markers import LEAVE_OUT
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.space.space import Space, enumerate_grid, parse_space

SWEEPS = (
    "opt=sgd,adam,none",
    *("+opt.momentum=choice(0.8,0.9)", "opt.nesterov=true,false", "opt.beta=choice(0.99,0.999)"),
)
CONDITIONS = {
    "opt.momentum": {"opt": "sgd"},
    "opt.nesterov": {"opt.momentum": 0.9},  # and so only with sgd
    "+opt.beta": {"opt": ["adam", "none"]},
}


def space_of(conditions: dict[str, Any], *arguments: str, **params: str) -> Space:
    space = parse_space(params, arguments or SWEEPS)
    add_conditions(space, conditions)
    return space


def drawn(**values: Any) -> dict[str, Any]:
    plain = {"opt": "sgd", "opt.momentum": 0.9, "opt.nesterov": True, "opt.beta": 0.99}
    return {**plain, **{name.replace("_", "."): value for name, value in values.items()}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (drawn(), ["opt=sgd", "+opt.momentum=0.9", "opt.nesterov=true"]),
        (drawn(opt_momentum=0.8), ["opt=sgd", "+opt.momentum=0.8"]),
        (drawn(opt="adam"), ["opt=adam", "opt.beta=0.99"]),
        (drawn(opt="none", opt_beta=0.999), ["opt=none", "opt.beta=0.999"]),
    ],
)
def test_keys_without_their_choice_are_left_out(
    values: dict[str, Any], expected: list[str]
) -> None:
    space = space_of(CONDITIONS)
    assert space.overrides(values) == expected
    assert list(space.active(values)) == [one.lstrip("+").partition("=")[0] for one in expected]


def test_all_that_a_key_depends_on_must_hold() -> None:
    space = space_of({"c": {"a": 1, "b": [2, 3]}}, "a=1,2", "b=range(1,5)", "c=interval(0,1)")
    found = [
        (a, b)
        for a in (1, 2)
        for b in range(1, 5)
        if "c" in space.active({"a": a, "b": b, "c": 0.5})
    ]
    assert found == [(1, 2), (1, 3)]


def test_values_of_another_type_are_others() -> None:
    space = space_of({"b": {"a": True}}, "a=1,true,'true'", "b=1,2")
    active = [list(space.active({"a": value, "b": 1})) for value in (1, True, "true")]
    assert active == [["a"], ["a", "b"], ["a"]]


def test_grid_has_each_combination_once() -> None:
    space = space_of(CONDITIONS)
    points = [space.overrides(point) for point in enumerate_grid(space)]
    assert points == [
        ["opt=sgd", "+opt.momentum=0.8"],
        ["opt=sgd", "+opt.momentum=0.9", "opt.nesterov=true"],
        ["opt=sgd", "+opt.momentum=0.9", "opt.nesterov=false"],
        *(["opt=adam", "opt.beta=0.99"], ["opt=adam", "opt.beta=0.999"]),
        *(["opt=none", "opt.beta=0.99"], ["opt=none", "opt.beta=0.999"]),
    ]
    options = RayTuneSweeperConf(search_alg=sweeper.GridConf(), scheduler=sweeper.FifoConf())
    assert extent(options, space, 7) == "7 trials."
    assert extent(options, space, 5) == "5 trials: the first of 7 combinations."


@pytest.mark.parametrize(
    ("search", "scheduler"),
    [
        (sweeper.RandomConf, sweeper.FifoConf),
        (sweeper.OptunaConf, sweeper.FifoConf),
        (sweeper.HyperoptConf, sweeper.FifoConf),
        (sweeper.BohbSearchConf, sweeper.BohbConf),
    ],
)
def test_every_search_has_conditions(search: Any, scheduler: Any) -> None:
    space = space_of(CONDITIONS)
    options = RayTuneSweeperConf(search_alg=search(seed=0), scheduler=scheduler(), metric="m")
    searcher = build_searcher(options, space, [Objective("m", "min")])
    seen = set()
    for number in range(30):
        values = searcher.suggest(str(number))
        keys = tuple(one.partition("=")[0] for one in space.overrides(values))
        assert ("opt.beta" in keys) == (values["opt"] != "sgd")
        seen.add(keys)
        result = {"m": float(number), "training_iteration": 1}
        searcher.on_trial_result(str(number), result)
        searcher.on_trial_complete(str(number), result)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("opt=sgd", ["+opt.momentum=0.9", "opt.nesterov=true", "opt=sgd"]),
        ("opt='adam'", ["opt.beta=0.99", "opt='adam'"]),
        ("opt.beta=0.5", ["opt=sgd", "+opt.momentum=0.9", "opt.nesterov=true", "opt.beta=0.5"]),
    ],
)
def test_command_line_may_fix_what_others_depend_on(argument: str, expected: list[str]) -> None:
    space = space_of(CONDITIONS, *SWEEPS, argument)
    assert space.overrides(drawn()) == expected


def test_keys_of_groups_may_depend_on_groups() -> None:
    space = space_of({"db/cache": {"db/engine": "b"}}, "db/engine=a,b", "db/cache=x,y")
    assert space.overrides({"db:engine": "a", "db:cache": "x"}) == ["db/engine=a"]
    assert space.overrides({"db:engine": "b", "db:cache": "x"}) == ["db/engine=b", "db/cache=x"]


def test_conditions_are_part_of_the_search_space() -> None:
    """By which a resumed sweep is compared."""
    assert "+opt.beta: only with opt=adam|none" in str(
        space_of(CONDITIONS, "+opt.beta=1,2", *SWEEPS[:-1])
    )


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"opt.momentu": {"opt": "sgd"}}, r"opt\.momentu is not searched\. Searched are: opt, "),
        ({"opt.beta": {"optimizer": "sgd"}}, r"optimizer is not searched\. Searched are: opt, "),
        ({"opt.beta": {"opt": "adm"}}, r"opt=adm, which is not searched.*opt=sgd,adam,none"),
        ({"opt.beta": {"opt": True}}, r"opt=true, which is not searched"),
        ({"opt.beta": "adam"}, r"opt\.beta has adam; expected what it depends on, such as \{opt"),
        ({"opt.beta": {}}, r"opt\.beta has \{\}; expected what it depends on"),
        ({"opt.beta": {"lr": 0.1}}, r"opt\.beta depends on lr, an interval of real numbers"),
        ({"opt": {"opt": "sgd"}}, "opt depends on itself"),
        ({"opt": {"opt.beta": 0.99}, "opt.beta": {"opt": "adam"}}, "depends on itself"),
    ],
)
def test_wrong_conditions_are_refused(conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra\.sweeper\.conditions: .*{message}"):
        space_of(conditions, *SWEEPS, "lr=interval(0,1)")


def test_conditions_that_are_no_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"conditions=sgd: expected keys with what they depend"):
        add_conditions(space_of({}), "sgd")


_CUSTOM = """
from lightning_mgpu.sweep.space.markers import LEAVE_OUT


def more(cfg, space):
    return {
        "opt.dampening": lambda values: values.get("opt.momentum", LEAVE_OUT),
        "opt.eps": lambda values: values["opt.beta"] / 1000,
        "+opt.last": lambda values: len(values),
    }
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conditional_space.py").write_text(_CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("custom")
def test_function_may_leave_its_key_out() -> None:
    space = parse_space({}, SWEEPS)
    add_custom(space, "conditional_space.more", OmegaConf.create())
    add_conditions(space, {**CONDITIONS, "opt.eps": {"opt": "adam"}})
    assert space.overrides(drawn(opt_momentum=0.8)) == [
        *("opt=sgd", "+opt.momentum=0.8", "opt.dampening=0.8", "+opt.last=3")
    ]
    assert space.overrides(drawn(opt="adam")) == [
        *("opt=adam", "opt.beta=0.99", "opt.eps=0.00099", "+opt.last=3")
    ]
    assert space.overrides(drawn(opt="none")) == ["opt=none", "opt.beta=0.99", "+opt.last=2"]


def test_marker_is_the_same_in_every_process() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(LEAVE_OUT)) is LEAVE_OUT
