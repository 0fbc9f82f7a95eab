"""Run sweeps as a user would, in processes of their own, on one Ray for all of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

APPS = Path(__file__).parent / "apps"

# Ray in a process that is nobody's child here: its workers come and go while tests look for leaks.
_DAEMON = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
if os.fork():
    os._exit(0)
os.setsid()
%s
with open(sys.argv[2] + ".new", "w") as file:
    file.write(f"{os.getpid()} {address}")
os.rename(sys.argv[2] + ".new", sys.argv[2])
signal.sigwait({signal.SIGTERM})
%s
"""

_CLUSTER = """
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR", _temp_dir=sys.argv[1])
address = ray.get_runtime_context().gcs_address
"""

_TWO_NODES = """
import socket
from ray.cluster_utils import Cluster
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
machines = Cluster()
machines.add_node(num_cpus=1, include_dashboard=False, ray_client_server_port=port)
machines.add_node(num_cpus=1)
address = f"127.0.0.1:{port}"
"""


def cluster() -> AbstractContextManager[str]:
    """Ray with two CPUs; its address."""
    return _daemon(_DAEMON % (_CLUSTER, "ray.shutdown()"))


def remote_cluster(home: Path) -> AbstractContextManager[str]:
    """Two nodes with a CPU each, to be used from a laptop; their address for that."""
    program = _DAEMON % (_TWO_NODES, "machines.shutdown()")
    # Else Ray's server for clients may fail where it forks, in the first seconds above all.
    forks = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    return _daemon(program, HOME=str(home), RAY_AUTH_MODE="disabled", **forks)


@contextmanager
def _daemon(program: str, **variables: str) -> Iterator[str]:
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it holds sockets
    ready = directory / "ready"
    environment = _own_environment(TMPDIR=str(directory), RAY_TMPDIR=str(directory), **variables)
    # Else Ray takes a node for dead on a machine that is busy.
    environment["RAY_health_check_failure_threshold"] = "100"
    subprocess.run([sys.executable, "-c", program, directory, ready], check=True, env=environment)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline, "Ray did not start"
        time.sleep(0.1)
    pid, address = ready.read_text().split()
    process = psutil.Process(int(pid))
    family = process.children(recursive=True)
    try:
        yield address
    finally:
        process.terminate()
        _, alive = psutil.wait_procs([process, *family], timeout=20)
        for one in alive:
            one.kill()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def foreign_ray() -> Iterator[str]:
    """Somebody else's Ray on this machine, without a CPU to run anything; its address."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    options = ("--head", "--port=0", "--num-cpus=0", "--include-dashboard=false", "--block")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", *options, f"--temp-dir={directory}"],
        env=_own_environment(TMPDIR=str(directory), RAY_AUTH_MODE="disabled"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "Ray did not start"
            found = re.search(r"--address='([\d.]+:\d+)'", line)
        family = psutil.Process(process.pid).children(recursive=True)
        yield found[1]
        assert process.poll() is None  # nobody has stopped it
    finally:
        process.terminate()
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for one in alive:
            one.kill()
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Swept:
    """How a sweep ended."""

    code: int
    out: str
    err: str
    directory: Path

    @property
    def results(self) -> dict[str, Any]:
        """The file of results."""
        return yaml.safe_load((self.directory / "optimization_results.yaml").read_text())

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials, by number."""
        return self.results["trials"]

    def value(self, name: str) -> dict[Any, dict[str, Any]]:
        """Trials by one of their values."""
        return {trial["params"][name]: trial for trial in self.trials}

    def json(self, number: int, name: str) -> Any:
        """What a trial has written."""
        return json.loads((self.directory / str(number) / name).read_text())


def command(app: str, address: str | None, *arguments: str, directory: str = "sweep") -> list[str]:
    """The command line of a sweep."""
    # Drawing takes seconds; what comes later wins.
    given = [f"hydra.sweep.dir={directory}", "hydra.sweeper.report=false", *arguments]
    if app.endswith(".py"):
        program = [str(APPS / app), "-m", "hydra/sweeper=ray_tune"]
    else:
        program = ["-m", app]
    if address is not None:
        given.append(f"hydra.sweeper.ray.address='{address}'")
    return [sys.executable, *program, *given]


def sweep(
    app: str, address: str | None, *arguments: str, directory: str = "sweep", **environment: str
) -> Swept:
    """Run a sweep to its end."""
    done = subprocess.run(
        command(app, address, *arguments, directory=directory),
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment_for(directory), **environment},
    )
    return Swept(done.returncode, done.stdout, done.stderr, Path(directory).absolute())


def environment_for(directory: str) -> dict[str, str]:
    """The environment of a sweep; Ray leaves lock files in the directory for temporary files."""
    temporary = Path(directory).absolute().parent
    return _own_environment(TMPDIR=str(temporary))


def _own_environment(**more: str) -> dict[str, str]:
    """Without what a Ray of other tests, in this process, has been told."""
    others = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    return {**others, "RAY_AUTH_MODE": "token", **more}


def interrupt(process: "subprocess.Popen[str]", signum: signal.Signals) -> tuple[float, str, str]:
    """Signal a sweep and wait for its end; how long that took, and what it wrote."""
    started = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return time.monotonic() - started, out, err


def resume_argument(text: str) -> str:
    """The argument that goes on with a sweep, as it was printed."""
    found = re.search(r"hydra\.sweeper\.resume=\S+", text)
    assert found is not None, text
    return found[0]
