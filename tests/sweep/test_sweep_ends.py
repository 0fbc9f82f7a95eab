"""What is left of a sweep that does not come to its end."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from sweeps import sweep

from lightning_mgpu.errors import ConfigError, SweepFailedError
from lightning_mgpu.sweep.driver.interrupts import Interrupts
from lightning_mgpu.sweep.driver.saving import results_saved
from lightning_mgpu.sweep.store.records import Records, TrialRecord

RESULTS = "optimization_results.yaml"


def prepared(*trials: TrialRecord) -> Any:
    records = Records("loss", "min", True, {record.number: record for record in trials})
    return SimpleNamespace(records=records, directory=Path.cwd())


def done() -> TrialRecord:
    return TrialRecord(0, {"x": 1}, ["x=1"], "0", status="done", history=[0.5])


def test_results_are_saved_before_an_error_is_shown() -> None:
    expected = rf"error, KeyError: 'x'\nResults so far: {RESULTS}\nResume with: .*sweeper.resume="
    with (
        pytest.raises(SweepFailedError, match=expected) as raised,
        results_saved(prepared(done()), Interrupts()),
    ):
        raise KeyError("x")
    assert isinstance(raised.value.__cause__, KeyError)
    assert yaml.safe_load(Path(RESULTS).read_text())["best_value"] == 0.5


def test_options_that_do_not_fit_are_no_failed_search() -> None:
    with pytest.raises(ConfigError, match="too little"), results_saved(prepared(), Interrupts()):
        raise ConfigError("too little")
    assert not Path(RESULTS).exists()


def test_sweep_that_cannot_be_resumed_keeps_its_results() -> None:
    Path(RESULTS).write_text("of before")
    with pytest.raises(SweepFailedError, match="OSError"), results_saved(prepared(), Interrupts()):
        raise OSError("state.tar")
    assert Path(RESULTS).read_text() == "of before"


@pytest.mark.slow
def test_sweep_outlives_trials_that_fill_the_machine() -> None:
    """Ray's monitor kills whatever runs each few seconds, since so little is allowed."""
    ended = sweep(
        "slow_app.py",
        None,
        *("x=1,2", "hydra/sweeper/search_alg=grid", "hydra.sweeper.max_concurrent_trials=1"),
        "hydra.sweeper.ray.num_cpus=1",
        RAY_memory_usage_threshold="0.001",
        RAY_memory_monitor_refresh_ms="5000",
    )
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    for trial in ended.trials:
        assert trial["status"] == "failed"
        expected = r"out of memory on the machine \(.*GB of .*GB used, .*GB .*\): Ray killed its"
        assert re.match(expected, trial["reason"])
    assert len(ended.trials) == 2
