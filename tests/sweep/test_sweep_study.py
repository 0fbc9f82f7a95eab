"""What other programs read of a sweep: a study of Optuna's, and a table. No Ray needed."""

import csv
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.space.space import parse_space
from lightning_mgpu.sweep.store.records import Records, TrialRecord
from lightning_mgpu.sweep.store.study import OptunaStudy
from lightning_mgpu.sweep.store.table import write_table

URL = "sqlite:///study.db"
SPACE = parse_space(
    {},
    [
        *("lr=tag(log,interval(1e-4,1e-1))", "depth=range(1,9)", "act=relu,null"),
        *("sizes=choice([1,2],[3])", "db/engine=a,b"),
    ],
)


def trial(number: int, status: str, *history: float, **more: Any) -> TrialRecord:
    values = {"lr": 0.01, "depth": 3, "act": None, "sizes": [1, 2], "db:engine": "b"}
    made = TrialRecord(number, values, ["lr=0.01"], f"sweep/{number}", status, **more)
    for epoch, value in enumerate(history):
        made.report(value, epoch)
    return made


def records(*trials: TrialRecord, **more: Any) -> Records:
    return Records("acc", "max", True, {one.number: one for one in trials}, **more)


def study_of(found: Records, *, resumes: bool = False) -> OptunaStudy:
    return OptunaStudy(URL, SPACE, found, Path.cwd() / "sweep", resumes)


def test_study_has_each_trial_that_has_ended_once() -> None:
    lacking = trial(2, "stopped", 0.4, ended_by="asha")
    del lacking.values["depth"]  # a key that only some trials have
    found = records(
        trial(0, "done", 0.5, 0.9, 0.7),
        trial(1, "failed", 0.3, reason="out of memory"),
        lacking,
        trial(3, "running", 0.1),
    )
    study = study_of(found)
    for record in (None, *found.ordered(), found.trials[0]):
        study.add(record)
    found.trials[3].status = "done"
    study_of(found, resumes=True).add_all()  # after the driver was killed

    read = optuna.load_study(study_name="sweep", storage=URL)
    assert read.direction.name == "MAXIMIZE"
    assert read.metric_names == ["acc"]
    assert [one.state.name for one in read.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [one.user_attrs["trial"] for one in read.trials] == [0, 1, 2, 3]
    assert (read.best_value, read.best_trial.user_attrs["directory"]) == (0.9, "sweep/0")
    assert read.best_params == {
        **{"lr": 0.01, "depth": 3, "act": None, "sizes": "[1,2]", "db:engine": "b"}
    }
    assert read.trials[0].intermediate_values == {0: 0.5, 1: 0.9, 2: 0.7}
    assert read.trials[1].user_attrs["reason"] == "out of memory"
    assert "depth" not in read.trials[2].params
    assert read.trials[2].user_attrs["ended_by"] == "asha"


def test_study_of_several_metrics() -> None:
    found = records(
        trial(0, "done", 0.5, metrics={"acc": 0.5, "loss": 2.0}), others=(Objective("loss", "min"),)
    )
    study_of(found).add_all()
    read = optuna.load_study(study_name="sweep", storage=URL)
    assert [direction.name for direction in read.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert read.trials[0].values == [0.5, 2.0]


def test_storage_that_cannot_be_used_is_refused() -> None:
    study_of(records())
    with pytest.raises(ConfigError, match="has a study named sweep already, of another sweep"):
        study_of(records())
    for url in ("nothing:///x", "sqlite:////no/such/directory/x.db"):
        with pytest.raises(ConfigError, match=f"optuna_storage={url}: cannot be used"):
            OptunaStudy(url, SPACE, records(), Path("sweep"), False)


def test_storage_that_fails_later_costs_no_sweep(caplog: pytest.LogCaptureFixture) -> None:
    strange = trial(0, "done", 0.5)
    strange.values["lr"] = 7.0  # outside of what is searched
    study = study_of(records(strange, trial(1, "done", 0.6)))
    with caplog.at_level(logging.WARNING):
        study.add_all()
    assert "a trial is left out, The value 7.0" in caplog.text
    assert len(optuna.load_study(study_name="sweep", storage=URL).trials) == 1


def test_table_has_a_row_for_each_trial(tmp_path: Path) -> None:
    first = trial(0, "done", 0.5, 0.9, metrics={"acc": 0.9, "loss": 0.1}, checkpoint="0/best.ckpt")
    failed = TrialRecord(1, {"lr": 0.1}, [], "sweep/1", "failed", reason='said "no", twice\n')
    with write_table(records(first, failed), tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["number", "status", "ended_by", "value"]
    assert rows[0]["value"] == "0.9"
    assert (rows[0]["epoch"], rows[0]["checkpoint"]) == ("1", "0/best.ckpt")
    assert (rows[0]["params.sizes"], rows[0]["metrics.loss"]) == ("[1,2]", "0.1")
    assert (rows[1]["value"], rows[1]["params.lr"], rows[1]["params.act"]) == ("", "0.1", "")
    assert rows[1]["reason"] == 'said "no", twice\n'
