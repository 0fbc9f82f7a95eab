"""Runs of Weights & Biases and of MLflow, one for each trial; no Ray needed.

Beside the real packages, where they are installed, there are modules that stand for them.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_mgpu.sweep.trial.tracking import GROUP, run_group, runs_ended

_TRIALS = """
import json, threading
from lightning_mgpu.sweep.trial.tracking import runs_ended
%s
seen = []

def trial(end):
    try:
        with runs_ended():
            seen.append(start())
            if end is not None:
                raise end
    except (ValueError, SystemExit):
        pass

for end in (None, ValueError(), SystemExit(0)):
    thread = threading.Thread(target=trial, args=(end,))
    thread.start()
    thread.join()
print(json.dumps([[run, status(run)] for run in seen]))
"""

_WANDB = """
import wandb
ended = {}
finish = wandb.finish

def noted(exit_code=None, **_):
    ended[wandb.run.id] = exit_code
    finish(exit_code=exit_code)

wandb.finish = noted

def start():
    run = wandb.init(mode="offline", project="trials")
    run.log({"x": 1})
    return run.id

def status(run):
    return ended[run]
"""

_MLFLOW = """
import mlflow

def start():
    return mlflow.start_run().info.run_id

def status(run):
    return mlflow.get_run(run).info.status
"""

_STANDS_FOR_WANDB = """
import types
run = None
count = 0

def init(**_):
    global run, count
    if run is None:
        count += 1
        run = types.SimpleNamespace(id=str(count), log=print)
        run.log = lambda _: None
    return run

def finish(exit_code=None):
    global run
    run = None
"""

_STANDS_FOR_MLFLOW = """
import types
runs, stack = {}, []

def start_run():
    if stack:
        raise Exception("Run is already active")
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id=str(len(runs)), status="RUNNING"))
    runs[run.info.run_id] = run
    stack.append(run)
    return run

def active_run():
    return stack[-1] if stack else None

def end_run(status="FINISHED"):
    stack.pop().info.status = status

def get_run(run):
    return runs[run]
"""


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "real"])
@pytest.mark.parametrize(
    ("name", "code", "stand_in", "statuses"),
    [
        ("wandb", _WANDB, _STANDS_FOR_WANDB, [0, 1, 0]),
        ("mlflow", _MLFLOW, _STANDS_FOR_MLFLOW, ["FINISHED", "FAILED", "FINISHED"]),
    ],
)
def test_each_trial_has_a_run_of_its_own(
    name: str, code: str, stand_in: str, statuses: list[object], real: bool
) -> None:
    if not real:
        Path(f"{name}.py").write_text(stand_in)
    elif importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    done = subprocess.run(
        [sys.executable, "-c", _TRIALS % code],
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": "runs"},
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert len({run for run, _ in runs}) == 3
    assert [status for _, status in runs] == statuses


def test_tracker_that_fails_is_named_and_the_trial_is_none_the_worse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=1, finish=lambda **_: 1 / 0))
    with caplog.at_level(logging.WARNING), runs_ended():
        pass
    assert "The run of wandb could not be ended: division by zero." in caplog.text


@pytest.mark.parametrize(
    ("sweep_dir", "environment", "expected"),
    [
        ("/runs/multirun/2026-01-01/10-00-00", {}, {GROUP: "multirun-2026-01-01-10-00-00"}),
        ("/data/first", {GROUP: ""}, {GROUP: "first"}),
        ("/data/first", {GROUP: "mine"}, {}),
    ],
)
def test_runs_are_grouped_by_sweep(
    sweep_dir: str, environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert run_group(Path(sweep_dir), environment, "/runs") == expected
