"""Hydra's own suites for sweepers and launchers, as far as they apply to a search.

- `BatchedSweeperTestSuite`: trials end in any order and there are no batches, so `sweep` returns
  none; the results are read from the directories of the jobs instead, two at a time.
- `IntegrationTestSuite`: its application returns nothing, but a search needs a value of each job.
  So each application gets a last line that returns one. It runs in this process, on the Ray of
  all tests, to save the start of one for each case; cases that differ only in where Hydra itself
  reads a value are left out.
- `LauncherTestSuite` does not apply: the trials' processes are our launcher, and most of its jobs
  return no number.
"""

import functools
import logging
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobReturn
from hydra.test_utils import test_utils
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite
from hydra.test_utils.test_utils import SweepTaskFunction
from omegaconf import OmegaConf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster", "hydra_restore_singletons")]

GRID = (
    "hydra/sweeper=ray_tune",
    "hydra/sweeper/search_alg=grid",
    "hydra/sweeper/scheduler=fifo",
    "hydra.sweeper.report=false",
)


class Sweep(SweepTaskFunction):
    """Hydra's runner of sweeps; what it returns is what lies in the jobs' directories."""

    def __enter__(self) -> "Sweep":
        super().__enter__()
        results = Path(self.temp_dir, "optimization_results.yaml")
        jobs = [
            _job(Path(trial["directory"]))
            for trial in yaml.safe_load(results.read_text())["trials"]
        ]
        self.returns: Any = [jobs[first : first + 2] for first in range(0, len(jobs), 2)]
        return self


def _job(directory: Path) -> JobReturn:
    cfg, hydra_cfg, overrides = (
        OmegaConf.load(directory / ".hydra" / f"{name}.yaml")
        for name in ("config", "hydra", "overrides")
    )
    return JobReturn(
        overrides=list(overrides),
        cfg=cfg,
        hydra_cfg=hydra_cfg,
        working_dir=str(directory),
        task_name=hydra_cfg.hydra.job.name,
    )


@pytest.fixture
def hydra_sweep_runner() -> Callable[..., Sweep]:
    def make(**given: Any) -> Sweep:
        sweep = Sweep()
        for name, value in given.items():
            setattr(sweep, name, str(value) if name == "temp_dir" else value)
        return sweep

    return make


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("basic", [*GRID, "hydra.sweeper.max_concurrent_trials=2"])],
)
class TestBatched(BatchedSweeperTestSuite):
    pass


def _only(test: Any, *ids: str) -> Any:
    """A test of Hydra's with some of its cases."""
    names, cases = test.pytestmark[0].args

    @functools.wraps(test)
    def chosen(*args: Any, **kwargs: Any) -> None:
        test(*args, **kwargs)

    kept = [case for case in cases if case.id in ids]
    assert len(kept) == len(ids)
    chosen.pytestmark = [pytest.mark.parametrize(names, kept).mark]  # type: ignore[attr-defined]
    return chosen


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", *GRID])])
class TestIntegration(IntegrationTestSuite):
    test_custom_task_name = _only(
        IntegrationTestSuite.test_custom_task_name,
        "different_filename_and_config_file_name_override_and_command_line_override",
    )
    test_custom_sweeper_run_workdir = _only(
        IntegrationTestSuite.test_custom_sweeper_run_workdir,
        *("sweep_dir_cli_overridding_config", "subdir:custom_override_dirname"),
    )

    def generate_custom_cmd(self) -> Callable[..., list[str]]:
        def change(cmd: list[str], filename: str) -> list[str]:
            program = Path(filename)
            body, main = program.read_text().split("\nif __name__")
            program.write_text(f"{body}    return 1.0\n\nif __name__{main}")
            shutil.rmtree("cli_dir", ignore_errors=True)  # one case sweeps twice, to one directory
            return cmd

        return change


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applications run without a process of their own."""

    def check_call(cmd: list[str], env: dict[str, str]) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", cmd[1:])
            runpy.run_path(cmd[1], run_name="__main__")

    monkeypatch.setattr(test_utils, "subprocess", SimpleNamespace(check_call=check_call))


@pytest.fixture(autouse=True)
def logging_kept() -> Iterator[None]:
    """Hydra sets logging up for a whole process."""
    root = logging.root
    before = root.level, root.handlers[:]
    yield
    root.level, root.handlers[:] = before
