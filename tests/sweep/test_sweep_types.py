"""Values of trials and their types: the same as under Hydra's own sweeper, without a Ray."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict
from ray.tune.utils.serialization import TuneFunctionEncoder

from lightning_mgpu._compat.hydra import shared_config_store
from lightning_mgpu.sweep.space.space import enumerate_grid, parse_space
from lightning_mgpu.sweep.store.results import job_command

pytestmark = pytest.mark.usefixtures("hydra_restore_singletons")

# Arguments of a sweep; an ampersand stands between two.
CASES = [
    "x='null','1e-3','007','true'",
    "x=null,1e-3,007,true,1_000,0x1,1.,0.1e1",
    "x=inf,nan,-inf,-1",
    "x='',' ',' a '",
    "x=\"it's\",'say \"x\"','a\\\\'",
    "x='a=b','a,b','a%b','a@b','a b','#a','!b'",
    "x=a%b,a@b,a b,a:b,/a/b.c,*,?",
    "x=a\\,b,c\\ d",
    "x='\ta','a\nb'",
    "x='$HOME',$y",
    "x=[[1,2],[3]],[[a,'b c']],[]",
    "x={a:1},{a:{b:[1]}},{}",
    "x={1:1},{1.5:2,true:4}",
    "x=${hydra:job.num},'${hydra:job.num}',1",
    "x=${other.key},2 & +other.key=3",
    "x=${oc.env:SOME_VALUE},'${oc.env:SOME_VALUE}/a b'",
    "x=range(3) & z=[],[1]",
    "x=range(0,1,0.5)",
    "x=sort(3,1,2,reverse=true)",
    "x=choice('a',\"b\") & y=choice(1)",
    "x=float(1,2)",
    "opt@model.opt=a,b",
    "opt@model.opt=glob(*) & model.opt.lr=5,6",
    "+opt@other=a,b",
    "+q.r=1,2 & ++q.s=3",
    "~s & x=1,2",
    "~s & +s=1,2",
    "++d={b:1},{b:2} & ++d.b=3",  # one after the other
    "++d.b=3 & ++d={b:1},{b:2}",
    "colour=RED,BLUE",
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SOME_VALUE", "a = b")
    monkeypatch.setattr(sys, "argv", ["app.py"])
    for name, text in (
        ("config", "defaults: [model: net, opt@model.opt: a, _self_]\n"),
        ("model/net", "w: 1\n"),
        ("opt/a", "lr: 1\n"),
        ("opt/b", "lr: 2\n"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("x: 1\ny: ${x}\nz: [1, 2]\ns: text\nd: {p: 1}\ncolour: RED\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"), shared_config_store():
        yield


def composed(overrides: list[str], number: int) -> str:
    """The config of a job with all that it refers to; `repr` tells types, and NaN from NaN."""
    cfg = compose("config", overrides, return_hydra_config=True)
    cfg.hydra.job.num = number
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
    assert hydra.job.num == number
    return repr(OmegaConf.to_container(cfg, resolve=True))


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("case", CASES)
def test_trial_has_the_values_that_hydras_own_sweeper_gives(case: str) -> None:
    arguments = case.split(" & ")
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    jobs = BasicSweeper.split_arguments(parsed, None)[0]

    space = parse_space({}, arguments, loader)
    points = enumerate_grid(space)
    trials = [space.overrides(point) for point in points]
    assert len(trials) == len(jobs)
    for number, (trial, job) in enumerate(zip(trials, jobs, strict=True)):
        assert trial == list(job) or composed(trial, number) == composed(list(job), number)

    # as Ray keeps the values of trials for a sweep that is resumed
    kept: list[dict[str, Any]] = json.loads(json.dumps(points, cls=TuneFunctionEncoder))
    assert [space.overrides(point) for point in kept] == trials

    for trial in trials:  # as the best one is printed, pasted into a shell
        words = shlex.split(job_command(trial))
        assert words[-len(trial) - 1 :] == [*trial, "hydra.mode=RUN"]
