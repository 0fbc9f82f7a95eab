"""From overrides to a search space and back; no Ray needed."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.custom import add_custom
from lightning_mgpu.sweep.space.space import (
    Choice,
    Interval,
    check_searchable,
    encode,
    enumerate_grid,
    parse_space,
)


@pytest.mark.parametrize(
    ("override", "dimension"),
    [
        ("k=1,2,3", Choice((1, 2, 3))),
        ("k=choice(16,32)", Choice((16, 32))),
        ("k=choice(a,'b c',\"d\")", Choice(("a", "b c", "d"))),
        ("k=choice('16',16)", Choice(("16", 16))),
        ("k=true,false,null", Choice((True, False, None))),
        ("k=choice(-1,-0.5)", Choice((-1, -0.5))),
        ("k=choice([1,2],[3])", Choice(([1, 2], [3]))),
        ("k=choice({a:1},{a:2})", Choice(({"a": 1}, {"a": 2}))),
        ("k=sort(3,1,2)", Choice((1, 2, 3))),
        ("k=interval(0,1)", Interval(0.0, 1.0)),
        ("k=interval(-1.5,1)", Interval(-1.5, 1.0)),
        ("k=int(interval(1,8))", Interval(1, 8, integer=True)),
        ("k=tag(int,interval(1,8))", Interval(1, 8, integer=True)),
        ("k=tag(log,interval(1e-4,1e-1))", Interval(1e-4, 1e-1, log=True)),
        ("k=tag(log,int,interval(1,1000))", Interval(1, 1000, log=True, integer=True)),
        ("k=tag(log,int(interval(1,1000)))", Interval(1, 1000, log=True, integer=True)),
        ("k=range(1,5)", Interval(1, 4, integer=True)),
        ("k=range(4)", Interval(0, 3, integer=True)),
        ("k=range(1,8,3)", Choice((1, 4, 7))),
        ("k=range(0,1,0.25)", Choice((0.0, 0.25, 0.5, 0.75))),
        ("k=range(3,4)", Choice((3,))),
    ],
)
def test_override_becomes_dimension(override: str, dimension: Any) -> None:
    assert parse_space({}, [override]).dimensions == {"k": dimension}


@pytest.mark.parametrize(
    ("override", "values", "expected"),
    [
        ("model=lenet,mlp", {"model": "mlp"}, "model=mlp"),
        ("+model.depth=1,2", {"model.depth": 2}, "+model.depth=2"),
        ("++trainer.x=1,2", {"trainer.x": 1}, "++trainer.x=1"),
        ("db/engine=a,b", {"db:engine": "b"}, "db/engine=b"),
        ("opt@model.opt=adam,sgd", {"opt@model.opt": "sgd"}, "opt@model.opt=sgd"),
        ("k=interval(0,1)", {"k": np.float64(0.25)}, "k=0.25"),
        ("k=int(interval(0,9))", {"k": np.int64(3)}, "k=3"),
    ],
)
def test_values_become_overrides(override: str, values: dict[str, Any], expected: str) -> None:
    assert parse_space({}, [override]).overrides(values) == [expected]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -3, 1e-5, 0.1, -2.5, float("inf")),
        *("adam", "", "16", "1e-3", "null", "True", "nan", "a b", "it's", 'say "x"', "a,b", "x=y"),
        *("back\\slash", "end\\", "päth/ü", "a:b", "[1]", "{a}", "$x", " lead"),
        *([1, "a b", None], {"a": [1, 2], "b c": "d"}, (1, 2)),
    ],
    ids=repr,
)
def test_encoded_value_is_read_as_the_same(value: Any) -> None:
    read = OverridesParser.create().parse_override(f"key={encode(value)}").value()
    expected = list(value) if isinstance(value, tuple) else value
    assert read == expected
    assert type(read) is type(expected)


def test_command_line_wins_over_params() -> None:
    params = {"a": "choice(1,2)", "b": "interval(0,1)", "+c": 3, "d": "choice(5,6)"}
    space = parse_space(params, ["b=0.5", "++c=1,2", "e=x"])
    assert space.dimensions == {
        "a": Choice((1, 2)),
        "d": Choice((5, 6)),
        "c": Choice((1, 2)),
    }
    assert space.keys["c"] == "++c"
    assert space.fixed == ["b=0.5", "e=x"]


def test_params_may_hold_values_that_are_not_strings() -> None:
    params = OmegaConf.create({"a": 1, "b": [1, 2], "c": None, "d": "x y"})
    assert parse_space(dict(params.items()), []).fixed == ["a=1", "b=[1,2]", "c=null", "d=x y"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("k=interval(2,1)", r"k: interval\(2\.0, 1\.0\) is empty"),
        ("k=tag(log,interval(0,1))", r"must start above 0"),
        ("k=tag(logg,interval(1,2))", r"tag\(logg\) is unknown; known: log, int"),
        ("k=range(3,3)", r"k=range\(3,3\): has no value"),
    ],
)
def test_wrong_sweep_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space({}, [override])


def test_unreadable_params_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.params: .*choice\(1"):
        parse_space({"a": "choice(1"}, [])


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        check_searchable(parse_space({}, ["a=1"]))


def test_grid_has_every_combination_in_hydras_order() -> None:
    space = parse_space({}, ["a=1,2", "b=int(interval(5,6))"])
    points = [tuple(point.values()) for point in enumerate_grid(space)]
    assert points == [(1, 5), (1, 6), (2, 5), (2, 6)]


def test_grid_of_an_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="a: an interval of real numbers has no grid"):
        enumerate_grid(parse_space({}, ["a=interval(0,1)"]))


_CUSTOM = """
def more(cfg, space):
    assert "a" in space
    return {
        "+b": "interval(0, 1)",
        "c": [1, 2],
        "d": lambda values: values["a"] * 10 + cfg.base,
        "e": lambda values: values["d"] + 1,
        "f": 7,
    }


def wrong(cfg, space):
    return 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_space.py").write_text(_CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("custom")
def test_custom_space_adds_and_computes() -> None:
    space = parse_space({}, ["a=1,2", "d=3", "f=choice(1,2)"])
    add_custom(space, "custom_space.more", OmegaConf.create({"base": 100}))
    assert set(space.dimensions) == {"a", "b", "c"}
    assert space.overrides({"a": 2, "b": 0.5, "c": 1}) == [
        *("a=2", "+b=0.5", "c=1", "d=120", "e=121", "f=7")
    ]


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom_space.absent", "cannot be imported"),
        ("nowhere.at_all", "cannot be imported"),
        ("plain", "cannot be imported"),
        ("custom_space.wrong", "returned int; a dict is expected"),
    ],
)
def test_wrong_custom_space_is_refused(name: str, message: str) -> None:
    space = parse_space({}, ["a=1,2"])
    with pytest.raises(ConfigError, match=message):
        add_custom(space, name, OmegaConf.create())
