"""`mode=doctor`: how checks are run, and what is printed and written."""

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks_apart import dies, hangs, raises
from command import run, run_process
from omegaconf import DictConfig

from lightning_mgpu.cli import main
from lightning_mgpu.cli.run import train
from lightning_mgpu.doctor import command
from lightning_mgpu.doctor.finding import Check, Finding, Level, bad, ok, warn
from lightning_mgpu.doctor.runner import examine
from lightning_mgpu.errors import ConfigError


def _fine() -> Iterator[Finding]:
    yield ok("fine", "all well", number=1)


def _slow() -> Iterator[Finding]:
    yield warn("slow", "works", "be patient")


def _broken() -> Iterator[Finding]:
    yield bad("broken", "does not work", "mend it")


@pytest.mark.parametrize("apart", [False, True])
def test_check_that_raises_is_bad_with_its_error(apart: bool) -> None:
    first, second = examine([Check("look", raises, seconds=60, apart=apart)])
    assert first == ok("before", "found")
    assert (second.name, second.level) == ("look", Level.BAD)
    assert second.found == "RuntimeError: cannot look"


def test_check_that_hangs_is_given_up() -> None:
    """In this process, where its thread is left behind until the event is set, and apart."""
    go_on = threading.Event()

    def waits() -> Iterator[Finding]:
        yield ok("before", "found")
        go_on.wait()

    checks = [Check("thread", waits, seconds=0.2), Check("apart", hangs, seconds=1, apart=True)]
    found = list(examine([*checks, Check("fine", _fine)]))
    go_on.set()
    assert [finding.name for finding in found] == ["before", "thread", "apart", "fine"]
    assert found[1].found == "not finished after 0.2 s, given up"
    assert found[2].found == "not finished after 1 s, given up"
    assert {found[1].level, found[2].level} == {Level.BAD}


def test_check_apart_ends_with_the_doctor(tmp_path: Path) -> None:
    code = (
        "import sys; from checks_apart import hangs_with; from lightning_mgpu.doctor import runner;"
        " from lightning_mgpu.doctor.finding import Check;"
        " list(runner.examine([Check('x', hangs_with, (sys.argv[1],), seconds=99, apart=True)]))"
    )
    lock = tmp_path / "lock"
    paths = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "TMPDIR": str(tmp_path),  # what is killed cannot tidy up
    }
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], env=paths) as doctor:
        try:
            while not lock.exists():
                assert doctor.poll() is None
                time.sleep(0.05)
        finally:
            doctor.kill()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the check's process to end


def test_check_that_kills_its_process_is_bad() -> None:
    first, finding = examine([Check("look", dies, seconds=60, apart=True)])
    assert first == ok("before", "found")
    assert finding.found == "ended with exit code 3: segmentation fault"


@pytest.mark.parametrize(("checks", "code"), [((_fine, _slow), 0), ((_fine, _slow, _broken), 1)])
def test_lines_file_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: tuple, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "checks_for", lambda cfg: [Check("x", run) for run in checks])
    done = run("mode=doctor", "hydra.run.dir=run")
    assert done.code == code, done.err
    lines = done.out.splitlines()
    assert lines[0] == "ok   fine             all well"
    assert lines[1:3] == ["warn slow             works", " " * 21 + " -> be patient"]
    assert lines[-1] == "Report: run/doctor.json"
    content = json.loads(Path("run/doctor.json").read_text())
    assert content["level"] == ("bad" if code else "warn")
    assert content["findings"][0] == {
        "name": "fine",
        "level": "ok",
        "found": "all well",
        "advice": "",
        "details": {"number": 1},
    }


def test_where_hydra_does_not_start_checks_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("a plugin of others")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "_register_sweeper", broken)
    monkeypatch.setattr(command, "checks_for", lambda cfg: [Check("x", _broken)])
    done = run("mode=doctor")
    assert (done.code, done.out.splitlines()[-1]) == (1, "Report: outputs/doctor/doctor.json")


def test_directory_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(command, "checks_for", lambda cfg: [Check("x", _fine)])
    done = run("mode=doctor", "hydra.run.dir=run", "output_dir=file/below")
    assert (done.code, "No report: " in done.out) == (0, True)
    done = run("mode=doctor", "hydra.run.dir=run", "output_dir=null")
    assert (done.code, "Error: output_dir=None: set it" in done.err) == (2, True)


@pytest.mark.slow
def test_real_command_with_a_torch_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torch.py").write_text("raise OSError('libtorch.so: no such file')\n")
    done = run_process("mode=doctor", "hydra.run.dir=run")
    assert done.code == 1
    assert "Traceback" not in done.err + done.out
    reds = [line for line in done.out.splitlines() if line.startswith("bad ")]
    assert reds == ["bad  torch loads      OSError: libtorch.so: no such file"]


@pytest.mark.slow
def test_real_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_process("mode=doctor", "hydra.run.dir=run")
    assert done.code == 0, done.out + done.err
    for name in ("python", "lightning", "memory", "clock", "hydra plugin", "copies", "gloo", "ray"):
        assert re.search(rf"^(ok|warn) +{name} ", done.out, re.MULTILINE), done.out
    assert "all_reduce of 2 ranks is right" in done.out
    assert sorted(os.listdir()) == ["run"]


def test_training_refuses_the_mode() -> None:
    with pytest.raises(ConfigError, match="mode=doctor: examines the machine"):
        train(DictConfig({"mode": "doctor", "output_dir": "run"}))
