"""Test in environments at the corners of what `pyproject.toml` allows (`make corners`).

Each corner is an environment in `.venv/corners/NAME`, kept for the next run while what it is made
from stays the same; its output is in `NAME.install.txt` and `NAME.tests.txt` beside it. A Python
or a release that cannot be had is said in the table; only failures make the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import tomllib

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv" / "corners"
EXTRAS = ("ray", "search", "report", "dev")
SHOWN = ("torch", "lightning", "ray", "hydra-core", "optuna")
TESTS = (
    "tests/config/test_conf.py",
    "tests/sweep/test_sweep_plugin.py",
    "tests/sweep/test_sweep_searchers.py",
    "tests/sweep/test_sweep_hydra.py",
    "tests/launch/test_payload.py",
    "tests/strategies/test_parity.py",
)
INSTALL_SECONDS = 3600
TEST_SECONDS = 1800


@dataclass(frozen=True)
class Corner:
    """A Python, the releases to start from, and requirements that take the place of theirs."""

    python: str
    base: Literal["lowest", "pinned", "newest"]
    but: tuple[str, ...] = ()


CORNERS = {
    "lowest": Corner("3.10", "lowest"),
    "pinned": Corner("3.11", "pinned"),
    "newest": Corner("3.13", "newest"),
    "python314": Corner("3.14", "newest"),
    # torch 2.6 wants an older sympy than the pinned one.
    "torch26": Corner("3.12", "pinned", ("torch==2.6.*", "sympy")),
    "optuna4": Corner("3.11", "pinned", ("optuna==4.*",)),
    "hydra14": Corner("3.11", "pinned", ("hydra-core>=1.4.0rc1", "omegaconf>=2.4.0rc1")),
}


class Unavailable(Exception):
    """What a corner needs and cannot have here."""


def normal(requirement: str) -> str:
    """The name in a requirement, as package indexes compare it."""
    found = re.match(r"[\w.-]*\w", requirement.strip())
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def declared(project: Mapping[str, object]) -> list[str]:
    """The requirements of the package and of `EXTRAS`, in `pyproject.toml`'s words."""
    extras = project["optional-dependencies"]
    dependencies = project["dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(dependencies, list)
    return [*dependencies, *(line for extra in EXTRAS for line in extras[extra])]


def lowest(requirement: str) -> str:
    """The oldest release that a requirement allows: `>=2.6,<2.14` becomes `==2.6`."""
    what, semicolon, marker = requirement.partition(";")
    return re.sub(r">=\s*([^,\s]+)(\s*,\s*<[^,\s]+)?", r"==\1", what) + semicolon + marker


def requirements(corner: Corner) -> tuple[list[str], list[str]]:
    """What to install in a corner, and the constraints to do it under."""
    lines = declared(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    if corner.base == "lowest":
        lines = [lowest(line) for line in lines]
    replaced = {normal(line) for line in corner.but}
    kept = [line for line in lines if normal(line) not in replaced]
    pins = (ROOT / "constraints.txt").read_text().splitlines() if corner.base == "pinned" else []
    constraints = [line for line in pins if normal(line) not in {"", *replaced}]
    return [*kept, *corner.but], constraints


def interpreter(version: str) -> str:
    """A Python of this version that can make environments: of the PATH, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = shutil.which(f"python{version}")
    installed = sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)
    for candidate in [*([found] if found else []), *installed]:
        # A shim of pyenv stands for Pythons that it does not run; Debian splits off `ensurepip`.
        tried = subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True)
        if tried.returncode == 0:
            return candidate
    raise Unavailable(f"not on this machine: Python {version}")


def call(command: Iterable[object], output: Path, seconds: float) -> int:
    """Run a command with its output in a file; 124 if it takes too long, as `timeout` has it."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    with (
        output.open("a") as file,
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest ends what its tests have started
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                print("killed", file=file)
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def install(name: str, corner: Corner) -> Path:
    """Make the environment of a corner, unless it is there; the Python in it."""
    wanted, constraints = requirements(corner)
    directory = ENVIRONMENTS / name
    recipe = "\n".join([corner.python, *wanted, "", *constraints, ""])
    stamp = directory / "recipe.txt"
    python = directory / "bin" / "python"
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    source = interpreter(corner.python)
    output = ENVIRONMENTS / f"{name}.install.txt"
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    output.write_text("")
    pins = ENVIRONMENTS / f"{name}.constraints.txt"
    pins.write_text("\n".join(constraints))
    # Compiling takes minutes, and most of torch, ray and plotly is never imported.
    pip = [python, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    steps: list[list[object]] = [
        [source, "-m", "venv", "--clear", directory],
        [*pip, "-c", pins, *wanted],
        # On its own: a corner may lie outside of what the package allows.
        [*pip, "--no-deps", "--ignore-requires-python", "-e", "."],
    ]
    deadline = time.monotonic() + INSTALL_SECONDS
    for step in steps:
        if call(step, output, deadline - time.monotonic()):
            missing = re.findall(r"No matching distribution found for (.+)", output.read_text())
            if missing and corner.base != "lowest":  # a lower bound is a claim of ours
                raise Unavailable(f"not in the package index: {missing[-1]}")
            raise RuntimeError(f"not installed, see {output.relative_to(ROOT)}")
    stamp.write_text(recipe)
    return python


def versions(python: Path) -> list[str]:
    """The versions of Python and of the packages in `SHOWN` in an environment."""
    code = (
        "import platform, sys; from importlib.metadata import version;"
        " print(platform.python_version(), *map(version, sys.argv[1:]))"
    )
    return subprocess.check_output([python, "-c", code, *SHOWN], text=True).split()


def run_tests(name: str, python: Path) -> dict[str, int]:
    """Run `TESTS` in an environment; how many passed, failed and were skipped."""
    output = ENVIRONMENTS / f"{name}.tests.txt"
    report = ENVIRONMENTS / f"{name}.xml"
    output.write_text("")
    report.unlink(missing_ok=True)
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    code = call(pytest, output, TEST_SECONDS)
    if code == 124 or not report.exists():
        why = f"more than {TEST_SECONDS} s" if code == 124 else f"pytest exited with {code}"
        raise RuntimeError(f"{why}, see {output.relative_to(ROOT)}")
    suite = ElementTree.parse(report).getroot()[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return {"passed": passed, "failed": failed or int(code != 0), "skipped": count["skipped"]}


def row(*cells: object) -> str:
    return "  ".join(f"{cell!s:<13}" for cell in cells).rstrip()


def visit(name: str) -> bool:
    """Test one corner and print its row of the table; whether it fails."""
    try:
        python = install(name, CORNERS[name])
        found = versions(python)
        started = time.monotonic()
        counts = run_tests(name, python)
    except Unavailable as reason:
        print(row(name, reason), flush=True)
        return False
    except RuntimeError as error:
        print(row(name, f"failed: {error}"), flush=True)
        return True
    print(row(name, *found, *counts.values(), round(time.monotonic() - started)), flush=True)
    return counts["failed"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Test at the corners of what is supported.")
    parser.add_argument("corners", nargs="*", metavar="CORNER", help=", ".join(CORNERS))
    chosen = parser.parse_args().corners or list(CORNERS)
    if unknown := set(chosen) - set(CORNERS):
        parser.error(f"no such corner: {', '.join(sorted(unknown))}; there are {[*CORNERS]}")
    print(row("corner", "python", *SHOWN, "passed", "failed", "skipped", "seconds"), flush=True)
    failed = [visit(name) for name in chosen]
    sys.exit(int(any(failed)))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background, too: end what runs
        signal.signal(number, signal.default_int_handler)
    main()
