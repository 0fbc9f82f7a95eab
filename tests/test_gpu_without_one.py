"""`make gpu` on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def _python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def _tests(cwd: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    quiet = ("-p", "no:cacheprovider", "-q", f"--basetemp={cwd}/tests")
    arguments = ("-m", "pytest", *quiet, f"{ROOT}/tests/gpu", *options)
    return _python(*arguments, cwd=cwd, **environment)


def test_it_says_so_and_ends_well(tmp_path: Path) -> None:
    done = _python(str(ROOT / "benchmarks" / "gpu.py"), "--tests", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "There is no CUDA device here, so that nothing was tested or measured.\n"
    assert not list(tmp_path.iterdir())


def test_its_tests_are_skipped_as_a_whole_and_say_so(tmp_path: Path) -> None:
    done = _tests(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "These tests need one GPU." in done.stdout
    assert "passed" not in done.stdout


def test_its_tests_can_be_tried_on_the_cpu(tmp_path: Path) -> None:
    chosen = "test_three_stages_with_skips_over_the_cut or test_copies_to_the_host_have_arrived"
    done = _tests(tmp_path, "-k", chosen, MGPU_DEVICE="cpu")
    assert done.returncode == 0, done.stdout
    assert "4 passed, 1 skipped" in done.stdout
