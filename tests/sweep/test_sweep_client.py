"""Sweeps that a laptop sends to a cluster: two nodes on this machine, with another home."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from sweeps import environment_for, interrupt, remote_cluster, resume_argument

from lightning_mgpu.sweep.report.reader import read

pytestmark = pytest.mark.slow

# A project that only the laptop has. Its job `x` waits until there is a file ``go-x``.
_APP = """
import hydra
from waiting import wait

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    return wait(cfg)

if __name__ == "__main__":
    main()
"""
_WAITING = """
import os, time
from pathlib import Path
from hydra.core.hydra_config import HydraConfig

def wait(cfg):
    with open(f"{cfg.signs}/began-{cfg.x}", "a") as file:
        file.write("x")
    while not Path(f"{cfg.signs}/go-{cfg.x}").exists():
        time.sleep(0.02)
    Path(HydraConfig.get().runtime.output_dir, "seen").write_text(f"{cfg.x} {os.environ['SHADE']}")
    return float(cfg.x)
"""
SWEEP = (
    *("app.py", "-m", "hydra/sweeper=ray_tune", "x=1,2,3", "hydra/sweeper/search_alg=grid"),
    *("hydra.sweeper.max_concurrent_trials=1", "hydra.sweeper.report=false"),
    *("hydra.sweep.dir=swept", "hydra.sweeper.ray.runtime_env.working_dir=.."),
    "+hydra.sweeper.ray.runtime_env.env_vars={SHADE:blue}",
)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home directory on the cluster."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(there: Path) -> Iterator[str]:
    with remote_cluster(there) as address:
        yield f"ray://{address}"


@pytest.fixture
def project() -> Path:
    """The directory in a project where its commands are run."""
    project = Path("project/scripts")
    (project / "conf").mkdir(parents=True)
    (project / "conf" / "config.yaml").write_text(f"x: 1\nsigns: {Path.cwd()}\n")
    (project / "app.py").write_text(_APP)
    (project / "waiting.py").write_text(_WAITING)
    return project


def _start(
    directory: Path, *arguments: str, stdout: int = subprocess.PIPE, **variables: str
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment_for("sweep") | {"RAY_AUTH_MODE": "disabled"} | variables,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def _terminal() -> Iterator[tuple[int, list[bytes]]]:
    """One end of a terminal, and what was written there when the block is over."""
    outer, inner = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # so a terminal ends
            while text := os.read(outer, 2**16):
                shown.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield inner, shown
    finally:
        os.close(inner)
        reader.join()
        os.close(outer)


def _sweeps() -> list[psutil.Process]:
    """The processes that run a sweep, on the laptop and on the cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "hydra.sweep.dir=swept" in process.cmdline():
                found.append(process)
    return found


def test_our_command_in_a_terminal(there: Path, address: str) -> None:
    """What it has found comes home."""
    arguments = (
        *("+search_space=lenet", f"ray.address={address}", "trainer=cpu", "trainer.max_epochs=1"),
        *("data.batch_size=256", "hydra.sweeper.num_samples=2", "hydra.sweeper.report=false"),
        *("hydra/sweeper/scheduler=fifo", "hydra.sweep.dir=multirun/first"),
    )
    with _terminal() as (terminal, shown):
        process = _start(Path(), "-m", "lightning_mgpu", *arguments, stdout=terminal, TERM="xterm")
        _, err = process.communicate(timeout=240)
    written = b"".join(shown).decode()
    assert process.returncode == 0, written + err
    assert "2 of 2 ended, 0 running" in written  # below the table
    assert "Downloaded to multirun/first" in written

    home = Path("multirun/first")
    results = yaml.safe_load((home / "optimization_results.yaml").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["done", "done"]
    cluster = there / "multirun/first"
    assert {trial["directory"] for trial in results["trials"]} == {
        str(cluster / "0"),
        str(cluster / "1"),
    }
    best = Path(results["best_checkpoint"])
    assert torch.load(home / best.relative_to(cluster), weights_only=True)["epoch"] == 0
    assert len(list(home.rglob("*.ckpt"))) == 1
    assert len({path.parts[-3] for path in cluster.rglob("*.ckpt")}) == 2
    for trial in ("0", "1"):
        for name in ("metrics.csv", "trial.log", ".hydra/overrides.yaml"):
            assert (home / trial / name).read_bytes() == (cluster / trial / name).read_bytes()
    assert "ray.address" not in results["best_command"]  # it is no run on Ray


def test_project_is_sent_and_a_sweep_that_was_cut_goes_on(
    project: Path, there: Path, address: str, eventually: Callable[..., None]
) -> None:
    """By Ctrl-C, then by the end of the laptop."""
    sweep = (*SWEEP, f"hydra.sweeper.ray.address={address}")
    process = _start(project, *sweep)
    try:
        Path("go-1").touch()
        eventually(Path("began-2").exists, 120)
        seconds, out, err = interrupt(process, signal.SIGINT)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert seconds < 10
    assert resume_argument(out) == "hydra.sweeper.resume=swept"
    assert address in out.partition("Resume with: ")[2]
    saved = yaml.safe_load((project / "swept" / "optimization_results.yaml").read_text())
    assert saved["trials"][0]["status"] == "done"
    assert (project / "swept/0/seen").read_text() == "1 blue"

    again = (*sweep, "hydra.sweeper.resume=swept")
    process = _start(project, *again, RAY_CLIENT_RECONNECT_GRACE_PERIOD="1")
    try:
        eventually(lambda: Path("began-2").read_text() == "xx", 120)
        Path("go-2").touch()
        eventually(Path("began-3").exists, 60)
    finally:
        process.kill()
        process.communicate()

    # The one on the cluster may still run, and is waited for. Nobody reads what this one writes.
    process = _start(project, *again)
    assert process.stdout is not None
    process.stdout.close()
    eventually(lambda: Path("began-3").read_text() == "xx", 120)
    Path("go-3").touch()
    process.wait(timeout=200)
    eventually(lambda: not _sweeps(), 60)
    done = yaml.safe_load((project / "swept" / "optimization_results.yaml").read_text())
    assert [trial["value"] for trial in done["trials"]] == [1.0, 2.0, 3.0]
    assert [Path(f"began-{x}").read_text() for x in (1, 2, 3)] == ["x", "xx", "xx"]
    assert len(read(project / "swept").sessions) == 3
    assert (project / "swept/2/seen").read_text() == "3 blue"
    assert (there / "swept/2/seen").exists()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("actor", "the cluster was lost"),
        ("sweep", "The sweep's own process on the cluster was killed (signal 9)"),
    ],
)
def test_what_is_lost_on_the_head_ends_command_and_sweep(
    project: Path,
    there: Path,
    address: str,
    lost: str,
    message: str,
    eventually: Callable[..., None],
) -> None:
    named = there / "shared" / lost
    sweep = (
        *(*SWEEP, f"hydra.sweeper.ray.address={address}", f"hydra.sweep.dir={named}"),
        "hydra.sweeper.max_concurrent_trials=null",
    )
    with _terminal() as (terminal, shown):
        process = _start(project, *sweep, stdout=terminal, TERM="xterm")
        try:
            # Both wait for their files: one on each node.
            eventually(lambda: Path("began-1").exists() and Path("began-2").exists(), 120)
            Path("go-1").touch()
            eventually(Path("began-3").exists, 60)
            (running,) = (found for found in _sweeps() if found.pid != process.pid)
            (running.parent() if lost == "actor" else running).kill()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert b"".join(shown).endswith(b"\x1b[?25h")  # the table had hidden the cursor
    assert message in err
    assert "Traceback" not in err
    assert resume_argument(err) == f"hydra.sweeper.resume={named}"
    eventually(lambda: not _sweeps(), 30)
    if lost == "actor":  # then the sweep could save what it had
        saved = yaml.safe_load((named / "optimization_results.yaml").read_text())
        assert saved["trials"][0]["status"] == "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hydra.sweeper.ray.runtime_env.working_dir=null",), "app.py is not there"),
        (
            ("hydra.sweeper.ray.num_cpus=4",),
            "num_cpus=4: the resources of the cluster at",
        ),
        (("hydra.sweeper.ray.address=ray://127.0.0.1:1",), "There is no Ray cluster at ray://127"),
        (("hydra.sweep.dir=../above",), "hydra.sweep.dir=../above: leads out of the home"),
        (("hydra.sweep.dir=other",), "already holds a sweep. Resume it with hydra.sweeper"),
        (("hydra.sweep.dir=mine",), "scripts/mine already holds a sweep, and the new one"),
    ],
)
def test_what_cannot_work_is_refused(
    project: Path, there: Path, address: str, arguments: tuple[str, ...], message: str
) -> None:
    for directory in (there / "other", project / "mine"):
        directory.mkdir(exist_ok=True)
        (directory / "search_space.yaml").write_text("{}\n")
    process = _start(project, *SWEEP, f"hydra.sweeper.ray.address={address}", *arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1, out  # Hydra's own; our command says 2
    assert message in err
    assert "Traceback" not in err
    assert not (project / "other").exists()
    assert not list(Path().glob("began-*"))
