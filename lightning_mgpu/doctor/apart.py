"""Run a check in a process of its own, which is killed with all it has started."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import IO

from lightning_mgpu.doctor.finding import Check, Finding, Level, bad
from lightning_mgpu.errors import one_line

_CODE = "from lightning_mgpu.doctor.apart import main; main()"


def run_apart(check: Check) -> Iterator[Finding]:
    """Run a check in a process of its own; what it found before its time was up remains.

    Args:
        check: One whose function has a name in its module.
    """
    with _directory() as directory:
        # Findings have a file of their own: libraries print to stdout and stderr as they like.
        findings, output = Path(directory, "findings"), Path(directory, "output")
        with output.open("w") as stream:
            child = _start(check, findings, stream)
            try:
                code: int | None = child.wait(check.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(child)
        if findings.exists():
            yield from _read(findings)
        if code is None:
            yield late(check)
        elif code != 0:
            lines = output.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            yield bad(
                check.name,
                f"ended with exit code {code}: {last}" if last else f"ended with exit code {code}",
                "The process was killed or crashed. See the system's log (`dmesg`).",
            )


def _directory() -> "tempfile.TemporaryDirectory[str]":
    # One that was killed may not be gone yet.
    return tempfile.TemporaryDirectory(prefix="lightning_mgpu_doctor_", ignore_cleanup_errors=True)


def late(check: Check) -> Finding:
    """The finding about a check that did not end."""
    return bad(
        check.name,
        f"not finished after {check.seconds:g} s, given up",
        "Something hangs here, or the machine is very busy. Try again when it is idle.",
    )


def failed(name: str, error: BaseException) -> Finding:
    """The finding about a check that raised."""
    return bad(
        name,
        f"{type(error).__name__}: {one_line(error, 300)}",
        "The check itself failed. Please report it with this text.",
    )


def main() -> None:
    """Run what the command line names, and write what it finds."""
    name, module, function, arguments, path = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(path, "w") as file:
        try:
            found: Iterable[Finding] = getattr(import_module(module), function)(
                *json.loads(arguments)
            )
            for finding in found:
                _write(finding, file)
        except Exception as error:
            _write(failed(name, error), file)


def _end_with_parent() -> None:
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _start(check: Check, findings: Path, output: IO[str]) -> "subprocess.Popen[bytes]":
    names = (check.run.__module__, check.run.__qualname__, json.dumps(check.arguments))
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, check.name, *names, str(findings)],
        # Imports what this process would import.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.PIPE,  # closes if this process ends, in whatever way
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # its ranks are killed with it
    )


def _kill(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    assert child.stdin is not None
    child.stdin.close()
    # One that waits for a device's driver cannot be killed, and is not waited for.
    threading.Thread(target=child.wait, daemon=True).start()


def _write(finding: Finding, file: IO[str]) -> None:
    file.write(json.dumps(asdict(finding)) + "\n")
    file.flush()


def _read(path: Path) -> Iterator[Finding]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else it was killed while writing
            values = json.loads(line)
            yield Finding(**{**values, "level": Level(values["level"])})
