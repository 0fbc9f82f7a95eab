"""Every test starts in an empty directory and must leave the process as it found it."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

# Two test processes with threads for every core each, which wait for one another by spinning, take
# many times as long as one by one, and all the more where something else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The programs that tests start import Lightning in half the time (see there).
sys.path.append(str(Path(__file__).parent / "site"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (sys.path[-1], os.environ.get("PYTHONPATH")))
)

import hypothesis
import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_mgpu.launch.pool import default_pool

with suppress(ImportError):
    import ray  # sets a variable and `sys.excepthook`, once and for all

ROOT = Path(__file__).parent.parent
SITE = str(ROOT / "tests" / "site")

# No files in the repository, and nothing that depends on how fast the machine is.
hypothesis.settings.register_profile("here", database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("here")

# Threads of other libraries that live as long as the process.
_LASTING_THREADS = ("tqdm_monitor", "pytest_timeout", "mgpu-ray-idle")
# What the test runner times tests with, and what torch's DataLoader listens to once and for all.
_FOREIGN_SIGNALS = {signal.SIGALRM, signal.SIGCHLD}
_SETTLE_SECONDS = 5.0


def pytest_configure() -> None:
    # A shell that starts the tests in the background has SIGINT ignored, and so would have every
    # program that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Temporary files of the code under test go where a leak can be seen."""
    directory = tmp_path_factory.mktemp("tempfile")
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(directory)
    yield directory
    tempfile.tempdir = before[0]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """The pool serves all tests of a session and goes with it."""
    yield
    default_pool().close()
    children = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=_SETTLE_SECONDS)
    assert not alive, f"processes left behind: {alive}"


@pytest.fixture(scope="module")
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path leaves room for that of a socket in it."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray instance for all tests, in a directory whose path is short enough for sockets."""
    from lightning_mgpu.ray import close, connection

    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="mgpu-") as directory,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("RAY_TMPDIR", directory)
        patched.setenv("RAY_AUTH_MODE", "disabled")
        # Else Ray takes its node for dead on a machine that is busy, and ends this process.
        patched.setenv("RAY_health_check_failure_threshold", "100")
        patched.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        # Trials pickle what the tests define by its name. (Some Pythons have a `sitecustomize` of
        # their own in their library, which must not come before the tests'.)
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, (SITE, *sys.path))))
        with connection.signal_handlers_kept():
            ray.init("local", num_cpus=4, resources={"tape": 2}, include_dashboard=False)
        yield
        close()
        ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path: Path, temporary_files: Path) -> Iterator[None]:
    # Not the `monkeypatch` fixture, which would then be undone after the check.
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        yield from _watch(temporary_files)


def _watch(temporary_files: Path) -> Iterator[None]:
    before = _Snapshot(temporary_files)
    yield
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (leaks := before.compare(_Snapshot(temporary_files))) and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread or process may be on its way out
    assert not leaks, f"the test leaks: {leaks}"


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; fail the test if it does not within `seconds`."""

    def wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not come true in time"
            time.sleep(0.02)

    return wait


class _Snapshot:
    """What a test could leave behind, by what it is."""

    def __init__(self, temporary_files: Path) -> None:
        workers = default_pool().pids
        self.state: dict[str, object] = {
            "processes": {
                child.pid
                for child in psutil.Process().children(recursive=True)
                if not _belongs_to(child, workers)
            },
            "threads": {
                thread
                for thread in threading.enumerate()
                if not thread.name.startswith(_LASTING_THREADS)
            },
            "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            "process group": dist.is_initialized(),
            "files in the repository": {path.name for path in ROOT.iterdir()},
            # `multiprocessing` keeps a directory for each process that has shared a tensor, and
            # cannot take it away when a loader's process is terminated. torch_geometric keeps the
            # code that it generates.
            "temporary files": {
                path.name
                for path in temporary_files.iterdir()
                if not path.name.startswith(("pymp-", "torch_geometric."))
            },
            "sys.excepthook": sys.excepthook,
            "signal handlers": {
                s: signal.getsignal(s) for s in signal.valid_signals() - _FOREIGN_SIGNALS
            },
            "rank": rank_zero_only.rank,
            "intra-op threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
        }

    def compare(self, after: "_Snapshot") -> dict[str, object]:
        """What is in `after` and was not here before."""
        leaks: dict[str, object] = {}
        for name, value in self.state.items():
            other = after.state[name]
            if isinstance(value, set) and isinstance(other, set):
                if other - value:
                    leaks[name] = other - value
            elif value != other:
                leaks[name] = (value, other)
        return leaks


def _belongs_to(process: psutil.Process, workers: list[int]) -> bool:
    try:
        family = [process, *process.parents()]
        # Ray starts its processes when it sees fit.
        return any(p.pid in workers or p.name() in ("raylet", "gcs_server") for p in family)
    except psutil.NoSuchProcess:
        return True
