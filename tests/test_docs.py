"""Every command and code block of the README and the docs is run as it stands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command import run
from sweeps import cluster

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"(?:# @package \w+\n)?# ([\w/]+\.\w+)\n")  # Hydra reads that line first


class Block(NamedTuple):
    """A fenced block; `name` is the file it stands for, if its first line says so."""

    page: Path
    number: int
    language: str
    text: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.page.name}-{self.number}-{self.language}"


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        for number, (language, text) in enumerate(_FENCE.findall(page.read_text())):
            match = _FILE_NAME.match(text)
            yield Block(page, number, language, text, match[1] if match else None)


BLOCKS = list(_blocks())
# `make demo` has a test of its own.
COMMANDS = [b for b in BLOCKS if b.language == "bash" and not b.text.startswith("make ")]
OURS = "python -m lightning_mgpu "


def _lines(block: Block) -> list[str]:
    return block.text.replace("\\\n", "").splitlines()


# Our command without Ray, which runs in this process, too. The README's has a process of its own.
HERE = [
    block
    for block in COMMANDS
    if block.page.stem in ("command", "pipeline")
    and all(line.startswith(OURS) for line in _lines(block))
]


def _is_run_by_a_command(block: Block) -> bool:
    stem = Path(block.name or "").stem
    return any(re.search(rf"\b{stem}\.", command.text) for command in COMMANDS)


SCRIPTS = [b for b in BLOCKS if b.language == "python" and not (b.name and _is_run_by_a_command(b))]


@pytest.fixture(scope="module")
def project(short_directory: Path) -> Path:
    """A user's project: the files that the pages show, and our package installed."""
    directory = short_directory / "project"
    directory.mkdir()
    for block in BLOCKS:
        if block.name:
            path = directory / block.name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(block.text)
    return directory


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose environment is set up already: this one."""
    directory = tmp_path_factory.mktemp("clone") / "lightning_mgpu"
    leave_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, directory, ignore=leave_out)
    shutil.rmtree(directory / "outputs", ignore_errors=True)
    # As `python -m venv` leaves it, with the stamps of the Makefile.
    (directory / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (directory / ".venv" / entry.name).symlink_to(entry)
    for stamp in (".demo", ".test"):
        (directory / ".venv" / stamp).unlink(missing_ok=True)
        (directory / ".venv" / stamp).touch()
    return directory


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


def _run(command: str, directory: Path, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"TMPDIR": str(directory), **variables}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _run_here(block: Block, directory: Path) -> None:
    """Run our command without the seconds that it takes to start a process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        for line in _lines(block):
            done = run(*shlex.split(line.removeprefix(OURS)))
            assert done.code == 0, f"{line}\n{done.out}\n{done.err}"


@pytest.fixture
def cluster_to_find(request: pytest.FixtureRequest, block: Block) -> dict[str, str]:
    """What joins a Ray that is there already; scripts, and the first sweep, start their own."""
    if block.page.stem not in ("ray", "sweeps") or block.number == 0:
        return {}
    return {"RAY_ADDRESS": request.getfixturevalue("ray_address"), "RAY_AUTH_MODE": "token"}


@pytest.mark.slow
@pytest.mark.parametrize("block", HERE, ids=str)
def test_commands_of_ours_run(block: Block, project: Path) -> None:
    _run_here(block, project)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in COMMANDS if b not in HERE], ids=str)
def test_commands_run(block: Block, project: Path, cluster_to_find: dict[str, str]) -> None:
    _run(block.text, project, **cluster_to_find)


@pytest.mark.slow
@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_scripts_run(block: Block, project: Path) -> None:
    script = project / (block.name or f"{block}.py")
    script.write_text(block.text)
    _run(f"python {script.name}", project)


@pytest.mark.slow
def test_demo_reaches_the_accuracy_it_promises(clone: Path) -> None:
    printed = _run("make demo", clone)
    accuracy = re.search(r"test_acc\s*│\s*([\d.]+)", printed)
    assert accuracy is not None, printed
    assert float(accuracy[1]) >= 0.97


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "`make test`" in (ROOT / "README.md").read_text()


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
