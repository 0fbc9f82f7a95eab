"""`dp` from the command line."""

from pathlib import Path

import command
import pytest


def test_trains_and_tests(tmp_path: Path) -> None:
    done = command.run_tiny("+strategy=dp", "trainer.devices=2")
    assert done.code == 0, done.err
    assert "test_acc" in done.metrics
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_unknown_choice_of_running_statistics_is_one_line() -> None:
    done = command.run_tiny("+strategy=dp", "strategy.batch_norm=all")
    assert done.code == 2
    assert "strategy.batch_norm=all" in done.err
    assert "'merge' or 'first'" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_trains_digits() -> None:
    done = command.run("+strategy=dp", "trainer.devices=2", "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert float(done.metrics["test_acc"]) >= 0.97


@pytest.mark.slow
def test_multirun_runs_each_strategy_once(tmp_path: Path) -> None:
    done = command.run_tiny("-m", "+strategy=dp,ddp,auto", "trainer.devices=2")
    assert done.code == 0, done.err
    sweep = tmp_path / "sweep"
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "2", "multirun.yaml"}
    for job in range(3):
        assert (sweep / str(job) / "metrics.csv").exists()
        assert not (sweep / str(job) / "metrics-1.csv").exists()
