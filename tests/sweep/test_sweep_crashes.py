"""Crashes of native code in the log of a trial."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mgpu.sweep.trial.crashes import crash_in

_DIE = """
import faulthandler, os, signal, sys
from pathlib import Path
from lightning_mgpu.sweep.trial.output import output_to
faulthandler.enable()
with output_to(Path("first.log")):
    print("said before")
    if sys.argv[1] == "within":
        os.kill(os.getpid(), signal.%s)
os.kill(os.getpid(), signal.%s)
"""


def die(signum: str, where: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _DIE % (signum, signum), where], capture_output=True, text=True
    )
    assert done.returncode < 0
    return done.stderr


@pytest.mark.parametrize(
    ("signum", "words"),
    [("SIGSEGV", "Segmentation fault"), ("SIGABRT", "Aborted"), ("SIGKILL", None)],
)
def test_crash_is_the_end_of_the_log(signum: str, words: str | None) -> None:
    assert die(signum, "within") == ""
    log = Path("first.log")
    assert log.read_text().startswith("said before\n")
    assert crash_in(log) == words
    with log.open("a") as file:
        file.write("said by the next attempt\n")
    assert crash_in(log) is None


def test_crash_after_a_trial_is_told_as_before_it() -> None:
    assert "Segmentation fault" in die("SIGSEGV", "after")
    assert crash_in(Path("first.log")) is None


def test_trial_without_a_log_has_no_crash() -> None:
    assert crash_in(Path("nowhere.log")) is None
