"""`DDPStrategy` in somebody's Hydra application: each job once, in its own directory."""

import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "apps" / "hydra_app.py"


def _run(*overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, str(APP), *overrides], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def _lines(directory: Path, name: str) -> list[str]:
    return (directory / name).read_text().splitlines()


def test_single_run(tmp_path: Path) -> None:
    _run("+strategy=ddp", "optimizer.lr=0.05", "hydra.run.dir=run")
    assert _lines(tmp_path / "run", "done.txt") == ["DDPStrategy 2"]
    for rank in range(2):
        assert _lines(tmp_path / "run", f"rank-{rank}.txt") == ["0 0.05"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_multirun_over_values_runs_each_job_once(tmp_path: Path) -> None:
    _run("-m", "+strategy=ddp", "optimizer.lr=0.1,0.01", "hydra.sweep.dir=sweep")
    for job, lr in enumerate(("0.1", "0.01")):
        directory = tmp_path / "sweep" / str(job)
        for rank in range(2):
            assert _lines(directory, f"rank-{rank}.txt") == [f"{job} {lr}"]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0", "1", "multirun.yaml"}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.slow
def test_multirun_over_strategies_in_any_mix(tmp_path: Path) -> None:
    _run("-m", "+strategy=ddp,dp,auto", "optimizer.lr=0.1,0.01", "hydra.sweep.dir=sweep")
    done = [_lines(tmp_path / "sweep" / str(job), "done.txt") for job in range(6)]
    assert done == [
        *[["DDPStrategy 2"]] * 2,
        *[["DataParallelStrategy 1"]] * 2,
        *[["SingleDeviceStrategy 1"]] * 2,
    ]
    for job in (2, 3, 4, 5):
        assert not (tmp_path / "sweep" / str(job) / "rank-1.txt").exists()
