"""What a sweep shows while it runs, and what it leaves behind; no Ray needed."""

import io
import logging
import pickle
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from rich.console import Console

from hydra_plugins.ray_tune_sweeper.config import AshaConf
from lightning_mgpu.sweep.driver.endings import Endings
from lightning_mgpu.sweep.driver.progress import Progress
from lightning_mgpu.sweep.main import _praise
from lightning_mgpu.sweep.search.stopper import SweepStopper
from lightning_mgpu.sweep.space.objectives import Objective
from lightning_mgpu.sweep.store import results
from lightning_mgpu.sweep.store.records import Records, TrialRecord
from lightning_mgpu.sweep.store.results import job_command, resume_command, write_results


def record(number: int, status: str = "done", *history: float, **given: Any) -> TrialRecord:
    values = {"lr": 0.001 * (number + 1), "act": "relu"}
    return TrialRecord(
        number, values, [f"lr={values['lr']}"], f"sweep/{number}", status, list(history), **given
    )


def records(*trials: TrialRecord, mode: str = "max", takes_best: bool = True) -> Records:
    return Records("acc", mode, takes_best, {trial.number: trial for trial in trials})


@pytest.mark.parametrize(
    ("mode", "takes_best", "best"),
    [("max", True, 0), ("max", False, 1), ("min", True, 0), ("min", False, 0)],
)
def test_best_trial_is_by_best_or_last_value(mode: str, takes_best: bool, best: int) -> None:
    found = records(
        record(0, "done", 0.9, 0.1), record(1, "stopped", 0.5), mode=mode, takes_best=takes_best
    ).best()
    assert found is not None
    assert found.number == best


def test_failed_and_empty_trials_are_never_the_best() -> None:
    assert records(record(0, "failed", 0.9), record(1, "running")).best() is None
    assert records().best() is None


@pytest.mark.parametrize(("takes_best", "lr"), [(True, 0.1), (False, 0.3)])
def test_results_name_the_values_with_which_the_best_value_was_reported(
    takes_best: bool, lr: float, tmp_path: Path
) -> None:
    changing = TrialRecord(0, {"lr": 0.1}, ["lr=0.1"], "0", "done", [0.5, 0.9], checkpoint="a.ckpt")
    changing.change({"lr": 0.3}, ["lr=0.3"])
    changing.history.append(0.7)
    changing.checkpoint = "b.ckpt"
    if takes_best:
        changing.change({"lr": 0.4}, ["lr=0.4"])  # and nothing reported since
    found = records(changing, takes_best=takes_best)
    written = yaml.safe_load(write_results(found, tmp_path).read_text())
    assert written["best_params"] == written["trials"][0]["params"] == {"lr": lr}
    assert f"lr={lr}" in written["best_command"]
    assert written["best_checkpoint"] == ("a.ckpt" if takes_best else "b.ckpt")
    assert f"(lr={lr})" in Progress(found, 1).line(changing)
    changing.restart()
    assert found.setting(changing).values == changing.values


@pytest.mark.parametrize(
    ("saved", "path", "epoch"),
    [
        ({"best": 1, "last": 3}, "best", 1),  # of the value
        ({"best": 0, "there": 1, "last": 3}, "there", 1),
        ({"best": 0, "gone": 1}, "best", 0),  # and the line says so
        ({}, "best", None),
    ],
)
def test_checkpoint_is_of_the_value_or_said_to_be_of_another_epoch(
    saved: dict[str, int], path: str, epoch: int | None, tmp_path: Path
) -> None:
    trial = TrialRecord(0, {"lr": 0.1}, ["lr=0.1"], "0", "done", checkpoint="best")
    for number, value in enumerate((0.5, 0.9, 0.7, 0.6)):
        trial.report(value, number)
    trial.saved = saved
    Path("there").touch()
    found = records(trial, takes_best=True)
    written = yaml.safe_load(write_results(found, tmp_path).read_text())
    assert (written["best_checkpoint"], written["best_epoch"]) == (path, 1)
    assert written.get("best_checkpoint_epoch") == epoch
    assert written["trials"][0].get("checkpoint_epoch") == epoch
    *_, last = _praise(found, trial)
    assert ("(of epoch 0, while the value is that of epoch 1" in last) == (epoch == 0)
    Path("there").unlink()


def several(*trials: TrialRecord) -> Records:
    """Loss as small and accuracy as large as can be; the latest report counts."""
    found = records(*trials, mode="min", takes_best=False)
    return replace(found, metric="loss", others=(Objective("acc", "max"),))


def test_front_holds_what_nothing_is_better_than() -> None:
    found = several(
        record(0, "done", 0.1, 0.5, metrics={"acc": 0.9}),
        record(1, "done", 0.4, metrics={"acc": 0.8}),
        record(2, "done", 0.5, metrics={"acc": 0.8}),  # 0 and 1 are better
        record(3, "failed", 0.1, metrics={"acc": 1.0}),
        record(4, "done", 0.1),
        record(5, "done", 0.5, metrics={"acc": 0.9}),  # as good as 0
    )
    assert [trial.number for trial in found.front()] == [0, 1, 5]
    assert found.values(found.trials[1]) == {"loss": 0.4, "acc": 0.8}
    assert found.values(found.trials[4]) is None


def test_several_objectives_are_shown_and_written(tmp_path: Path) -> None:
    found = several(
        record(0, "done", 0.5, metrics={"acc": 0.9}), record(1, "done", 0.4, metrics={"acc": 0.8})
    )
    out = io.StringIO()
    with Progress(found, 2, Console(file=out, force_terminal=True, width=90)) as progress:
        progress(None)
    assert "best so far: trial 0, loss=0.5 acc=0.9" in out.getvalue()
    assert "best so far: trial 1, loss=0.4 acc=0.8" in out.getvalue()
    content = yaml.safe_load(write_results(found, tmp_path).read_text())
    assert (content["metric"], content["mode"]) == (["loss", "acc"], ["min", "max"])
    assert [s["values"] for s in content["solutions"]] == [[0.5, 0.9], [0.4, 0.8]]
    assert content["solutions"][0]["params"] == {"lr": 0.001, "act": "relu"}
    assert content["trials"][1]["value"] == [0.4, 0.8]
    assert "best_trial" not in content


def test_line_of_a_trial_says_what_became_of_it() -> None:
    all_trials = records(record(0, "done", 0.9), record(1, "failed", reason="ValueError: no"))
    progress = Progress(all_trials, 4, Console(file=io.StringIO()))
    assert (
        progress.line(all_trials.trials[0])
        == "Trial 0 done: acc=0.9 (best so far) (lr=0.001 act=relu). 2 of 4."
    )
    assert "Trial 1 failed: ValueError: no (lr=0.002" in progress.line(all_trials.trials[1])


def test_what_ended_a_trial_is_said() -> None:
    all_trials = records(record(0, "done", 0.9), record(1, "stopped", 0.5, ended_by="asha"))
    out = io.StringIO()
    with Progress(all_trials, 4, Console(file=out, force_terminal=True, width=90)) as progress:
        progress(None)
    assert "stopped (asha)" in out.getvalue()
    assert progress.line(all_trials.trials[1]).startswith("Trial 1 stopped (asha): acc=0.5 (")


def test_trial_is_ended_by_the_scheduler_its_limit_or_the_sweep() -> None:
    stopper = SweepStopper(records(), 1.0, seconds=1.0)
    endings = Endings(AshaConf(max_t=9), stopper)
    assert endings.stopped({"training_iteration": 8}) == "asha"
    assert endings.stopped({"training_iteration": 9}) == "asha, max_t=9"
    assert Endings(AshaConf(), stopper).stopped({"training_iteration": 900}) == "asha"
    assert endings.cut_short() is None
    stopper.option = "time_budget_s"
    assert endings.cut_short() == "time_budget_s"


def test_elsewhere_than_in_a_terminal_there_is_a_line_for_each_trial(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    all_trials = records(record(0, "done", 0.9), record(1, "running"))
    with Progress(all_trials, 2, Console(file=io.StringIO())) as progress:
        progress(None)
        progress(all_trials.trials[0])
    assert [entry.message.partition(":")[0] for entry in caplog.records] == ["Trial 0 done"]


def test_terminal_shows_a_table_with_the_best_and_what_is_left() -> None:
    out = io.StringIO()
    all_trials = records(
        record(0, "done", 0.91), record(1, "running", 0.4), record(2, "failed"), record(3)
    )
    with Progress(all_trials, 8, Console(file=out, force_terminal=True, width=90)) as progress:
        progress(None)
    shown = out.getvalue()
    for text in ("lr", "act", "relu", "0.91", "running", "best so far: trial 0, acc=0.91"):
        assert text in shown
    assert "3 of 8 ended, 1 running, 1 failed" in shown
    assert "(best so far)" not in shown


@pytest.mark.parametrize("width", [60, 100, 200])
def test_names_in_the_table_are_cut_at_their_start_and_differ(width: int) -> None:
    names = [
        *("model.net.lin1_size", "model.net.lin2_size", "model.net.dropout_of_the_last_layer"),
        *("model.optimizer.weight_decay", "model.optimizer.lr", "data.batch_size"),
    ]
    trial = TrialRecord(0, dict.fromkeys(names, 0.125), [], "0", "done", [0.9])
    out = io.StringIO()
    console = Console(file=out, width=width)
    table = Progress(records(trial), 1, console).table()
    heads = [str(column.header) for column in table.columns][1:7]
    assert len(set(heads)) == len(names)
    for name, head in zip(names, heads, strict=True):
        assert name.endswith(head.removeprefix("…"))
    assert "lr" in heads
    if width == 200:
        assert heads[:2] == ["lin1_size", "lin2_size"]
    if width >= 100:  # as they stand
        console.print(table)
        for head in heads:
            assert f"┃ {head} " in out.getvalue()


def test_names_that_end_alike_are_not_cut_until_they_look_the_same() -> None:
    names = ["net.encoder_hidden_size", "net.decoder_hidden_size"]
    trial = TrialRecord(0, dict.fromkeys(names, 1), [], "0", "done", [0.9])
    table = Progress(records(trial), 1, Console(file=io.StringIO(), width=30)).table()
    heads = [str(column.header) for column in table.columns][1:3]
    assert heads == ["encoder_hidden_size", "decoder_hidden_size"]


def test_table_of_many_trials_shows_the_running_the_latest_and_the_best() -> None:
    trials = [record(number, "done", 0.5) for number in range(40)]
    trials[3].history, trials[39].status = [0.99], "running"
    console = Console(file=io.StringIO(), width=90)
    table = Progress(records(*trials), 50, console).table()
    numbers = list(table.columns[0].cells)
    assert numbers[0] == "3"
    assert numbers[-1] == "39"
    assert len(numbers) <= 13


def test_time_left_follows_the_pace() -> None:
    all_trials = records(record(0, "running"), record(1, "running"))
    progress = Progress(all_trials, 5, Console(file=io.StringIO()))
    assert progress.seconds_left() is None
    with patch("time.monotonic", lambda: 100.0):
        progress(None)
    with patch("time.monotonic", lambda: 110.0):
        all_trials.trials[0].status = "done"
        assert progress.seconds_left() is None
        all_trials.trials[1].status = "stopped"
        assert progress.seconds_left() == 15.0


def test_results_are_plain_yaml_with_the_best_trial(tmp_path: Path) -> None:
    best = record(1, "stopped", 0.7, 0.9, checkpoint="sweep/1/best.ckpt", metrics={"loss": 0.1})
    path = write_results(records(record(0, "failed", reason="why"), best), tmp_path)
    content = yaml.safe_load(path.read_text())
    assert content["best_trial"] == 1
    assert content["best_value"] == 0.9
    assert content["best_params"] == {"lr": 0.002, "act": "relu"}
    assert content["best_checkpoint"] == "sweep/1/best.ckpt"
    assert content["trials"][0]["reason"] == "why"
    assert content["trials"][1]["reports"] == 2
    assert content["trials"][1]["metrics"] == {"loss": 0.1}


def test_results_without_a_best_trial_say_so(tmp_path: Path) -> None:
    path = write_results(records(record(0, "failed")), tmp_path)
    assert yaml.safe_load(path.read_text())["best_trial"] is None


def test_commands_can_be_pasted_into_a_shell() -> None:
    arguments = ["my app.py", "-m", "--config-name", "other", "hydra/sweeper=ray_tune", "x=1,2"]
    overrides = ["x='a b'", "y=[1,2]"]
    with patch.object(sys, "argv", arguments), patch.object(results, "program", lambda: ["p"]):
        alone = shlex.split(job_command(overrides))
        # Without `-m`, and even if a config of the job has it sweep by itself.
        assert alone == ["p", "--config-name", "other", *overrides, "hydra.mode=RUN"]
        again = shlex.split(resume_command(Path("/a b")))
        assert again == ["p", *arguments[1:], "hydra.sweeper.resume=/a b"]
        with patch.object(sys, "argv", again[0:]):
            assert shlex.split(resume_command(Path("/a b"))) == again


def test_command_of_a_trial_keeps_what_hydra_was_told_about_jobs() -> None:
    of_jobs = [
        *("hydra.searchpath=[pkg://lightning_mgpu.conf, file://my conf]", "hydra.job.chdir=true"),
        *("hydra/job_logging=none", "+hydra.job.env_set.MODE=fast", "~hydra.callbacks"),
        *("hydra.run.dir='runs/${now:%H}'", "hydra.verbose=[a,b]"),
    ]
    of_the_sweep = [
        *("hydra/sweeper=ray_tune", "hydra/sweeper/search_alg=grid", "hydra.sweeper.metric=a"),
        *("+hydra.sweeper.ray.num_gpus=1", "hydra.mode=MULTIRUN", "hydra.sweep.dir=s"),
        *("hydra.sweep.subdir=x", "hydra/launcher=basic", "hydra.launcher.x=1"),
    ]
    arguments = ["app.py", "-m", *of_jobs, *of_the_sweep, "x=1,2", "hydra_like=2"]
    with patch.object(sys, "argv", arguments), patch.object(results, "program", lambda: ["p"]):
        assert shlex.split(job_command(["x=1"])) == ["p", *of_jobs, "x=1", "hydra.mode=RUN"]


@pytest.mark.parametrize(
    ("statuses", "rate", "ends"),
    [
        (["failed", "failed"], 0.0, False),  # too few to say
        (["failed", "failed", "done"], 0.5, True),
        (["failed", "done", "done", "stopped"], 0.5, False),
        (["failed", "failed", "failed"], 1.0, False),
    ],
)
def test_sweep_ends_when_too_many_fail(statuses: list[str], rate: float, ends: bool) -> None:
    trials = [record(number, status) for number, status in enumerate(statuses)]
    stopper = SweepStopper(records(*trials), rate, None)
    assert stopper.stop_all() is ends
    assert ("max_failure_rate" in (stopper.why or "")) is ends


def test_sweep_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stopper = SweepStopper(records(), 1.0, 5.0)
    now = 200.0
    assert not stopper.stop_all()  # the first step: Ray has started
    now = 204.9
    assert not stopper.stop_all()
    now = 205.0
    assert stopper.stop_all()
    assert stopper.why == "hydra.sweeper.time_budget_s=5.0 is over"


def test_sweep_that_is_resumed_does_not_end_by_the_rules_of_before() -> None:
    """Ray keeps the stopper in its state, and puts it in the place of the new one."""
    trials = [record(number, "failed") for number in range(3)]
    saved = pickle.dumps(SweepStopper(records(*trials), 0.5, 1.0))
    now = SweepStopper(records(), 0.5, None)
    assert pickle.loads(saved) is now
