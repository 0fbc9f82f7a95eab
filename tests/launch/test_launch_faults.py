"""Launches that go wrong: they end soon, say why, and the next one works."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import psutil
import pytest
import torch
import torch.distributed as dist

from lightning_mgpu.launch.errors import (
    RankHungError,
    RemoteFailure,
    UnpicklableError,
    WorkerDiedError,
    is_collective_error,
    is_timeout_error,
)
from lightning_mgpu.launch.payload import Payload
from lightning_mgpu.launch.pool import default_pool
from lightning_mgpu.launch.rank import Rank

_TIMEOUT = timedelta(minutes=30)
_SHORT = timedelta(seconds=2)
# Far below the timeout, far above what a slow machine needs.
_SOON = 30.0
_SETTLE_SECONDS = 5.0


def launch(
    function: Callable[[Rank], Any],
    world_size: int = 2,
    *,
    local: Callable[[Rank], Any] | None = None,
    timeout: timedelta = _TIMEOUT,
    **options: Any,
) -> list[Any]:
    """Run `function` on all ranks, or `local` in its place on rank 0."""
    with Payload(function) as remote:
        return default_pool().launch(
            local or function, remote, world_size=world_size, timeout=timeout, **options
        )


def sum_of_ranks(rank: Rank) -> int:
    rank.join_group("gloo", _TIMEOUT)
    value = torch.tensor(rank.rank)
    dist.all_reduce(value)
    return int(value)


def wait_for_the_others(rank: Rank, timeout: timedelta = _TIMEOUT) -> None:
    rank.join_group("gloo", timeout)
    dist.barrier()


def sleep_in_this_function() -> None:
    time.sleep(600)


def loop_forever(_rank: Rank) -> NoReturn:
    while True:
        time.sleep(0.05)


def raise_value_error() -> NoReturn:
    raise ValueError("bad value") from KeyError("first")


def raise_system_exit() -> NoReturn:
    sys.exit(3)


def raise_keyboard_interrupt() -> NoReturn:
    raise KeyboardInterrupt


class TwoPartError(Exception):
    """Pickles, and then fails to unpickle: `args` are not what `__init__` takes."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(f"{part} and {other}")


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def raise_two_part_error() -> NoReturn:
    raise TwoPartError("one", "two")


def raise_locked_error() -> NoReturn:
    raise LockedError


class FailsToLoad:
    """Pickles; raises when a worker unpickles it."""

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return raise_value_error, ()

    def __call__(self, rank: Rank) -> None:
        pass


def fail_to_prepare(rank: Rank) -> None:
    raise ValueError(f"not prepared for {rank.rank}")


@pytest.fixture
def recovers() -> Iterator[None]:
    """The next launch works, collectives and all, and nothing of the failed one is left."""
    yield
    assert not dist.is_initialized()
    assert _open_payloads() == []
    assert launch(sum_of_ranks) == [1, 1]


def _error_of(function: Callable[[], NoReturn]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error


@contextmanager
def soon(seconds: float = _SOON) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# Exceptions


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (raise_value_error, ValueError, r"^bad value$"),
        (raise_locked_error, RuntimeError, r"^Rank 1 raised .*LockedError: holds a lock$"),
        (raise_two_part_error, RuntimeError, r"^Rank 1 raised .*TwoPartError: one and two$"),
        (raise_system_exit, RuntimeError, r"^Rank 1 raised SystemExit: 3$"),
        (raise_keyboard_interrupt, KeyboardInterrupt, r"^$"),
    ],
    ids=["plain", "unpicklable", "fails to unpickle", "SystemExit", "KeyboardInterrupt"],
)
def test_remote_failure_restores_what_it_can(
    function: Callable[[], NoReturn], kind: type[BaseException], message: str
) -> None:
    """Without processes; the next test has them."""
    error = RemoteFailure.of(_error_of(function)).restore(1)
    with pytest.raises(kind, match=message):
        raise error
    assert f"in {function.__name__}" in str(error.__cause__)


@pytest.mark.usefixtures("recovers")
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        pytest.param(raise_value_error, ValueError, "^bad value$"),
        pytest.param(
            raise_locked_error,
            RuntimeError,
            "^Rank 1 raised .*LockedError: holds a lock$",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            raise_system_exit,
            RuntimeError,
            "^Rank 1 raised SystemExit: 3$",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "unpicklable", "SystemExit"],
)
def test_exception_on_a_worker_reaches_the_caller(
    function: Callable[[], NoReturn], kind: type[BaseException], message: str
) -> None:
    """Rank 0 waits in a collective meanwhile, which ends with an error of its own."""

    def fail(rank: Rank) -> None:
        rank.join_group("gloo", _TIMEOUT)
        if rank.rank == 1:
            function()
        dist.barrier()

    with soon(), pytest.raises(kind, match=message) as info:
        launch(fail)
    cause = str(info.value.__cause__)
    assert "On rank 1" in cause
    assert f"in {function.__name__}" in cause
    if function is raise_value_error:
        assert "KeyError: 'first'" in cause


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_exception_of_a_local_class_can_be_caught() -> None:
    """Classes without a module that a worker could import keep their identity, too."""

    class LocalError(Exception):
        pass

    def fail(rank: Rank) -> None:
        if rank.rank == 1:
            raise LocalError("mine")

    with pytest.raises(LocalError, match="mine"):
        launch(fail)


@pytest.mark.usefixtures("recovers")
def test_exception_on_rank_zero_is_the_very_one() -> None:
    error = ValueError("only here")

    def fail(_rank: Rank) -> None:
        raise error

    with soon(), pytest.raises(ValueError, match="only here") as info:
        launch(wait_for_the_others, local=fail)
    assert info.value is error
    assert error.__cause__ is None


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_first_cause_wins_over_the_peers_lost_connections() -> None:
    def fail(rank: Rank) -> None:
        rank.join_group("gloo", _TIMEOUT)
        if rank.rank == 2:
            raise_value_error()
        dist.barrier()

    with soon(), pytest.raises(ValueError, match="bad value") as info:
        launch(fail, 3)
    assert "On rank 2" in str(info.value.__cause__)


@pytest.mark.usefixtures("recovers")
def test_no_rank_can_fail_while_another_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo would go on to connect to it, for as long as a collective may take."""
    gone_on = tmp_path / "gone_on"

    def join(rank: Rank) -> None:
        rank.join_group("gloo", _TIMEOUT)
        gone_on.touch()

    join_at_first = dist.init_process_group

    def join_slowly(*args: Any, **kwargs: Any) -> None:
        join_at_first(*args, **kwargs)
        time.sleep(0.5)
        assert not gone_on.exists()

    monkeypatch.setattr(dist, "init_process_group", join_slowly)
    launch(join)
    assert gone_on.exists()


@pytest.mark.usefixtures("recovers")
def test_unpicklable_result_is_named() -> None:
    with soon(), pytest.raises(UnpicklableError, match=r"`result of rank 1\['lock'\]` cannot be"):
        launch(lambda rank: {"lock": threading.Lock()})


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_results_that_nobody_takes_are_closed() -> None:
    """Rank 1 is done, and its result under way, when rank 0 fails."""

    def fail(_rank: Rank) -> None:
        deadline = time.monotonic() + _SOON
        while not _open_payloads()[1:] and time.monotonic() < deadline:
            time.sleep(0.02)
        raise_value_error()

    with pytest.raises(ValueError, match="bad value"):
        launch(lambda rank: torch.ones(1000), local=fail)
    assert _open_payloads() == []


@pytest.mark.usefixtures("recovers")
def test_payload_that_does_not_load_says_why() -> None:
    with soon(), pytest.raises(ValueError, match="bad value"):
        launch(FailsToLoad())


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_preparation_that_fails_says_why() -> None:
    with soon(), pytest.raises(ValueError, match="not prepared for 1"):
        launch(wait_for_the_others, prepare=fail_to_prepare)


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_class_that_the_worker_cannot_import_is_named() -> None:
    """It came not in the payload but in the message that announces it."""
    only_here = ModuleType("mgpu_only_here")
    exec("class Stop(Exception): pass", only_here.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, only_here.__name__, only_here)
        with soon(), pytest.raises(ModuleNotFoundError, match="mgpu_only_here"):
            launch(wait_for_the_others, normal_exit=(only_here.Stop,))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("failed to recv"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("Socket closed "), True),
        (RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 2000 ms"), True),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (ValueError("NCCL is my favourite"), False),
    ],
    ids=[
        *("gloo", "nccl", "store", "closed pair", "closed socket", "monitored barrier"),
        *("other", "other timeout", "other type"),
    ],
)
def test_collective_errors_are_told_apart(error: Exception, expected: bool) -> None:
    assert is_collective_error(error) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 2000 ms"), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: ran for 9 ms"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), False),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
    ],
    ids=["gloo", "closed pair", "monitored barrier", "nccl", "lost peer", "other"],
)
def test_timeouts_of_collectives_are_told_apart(error: Exception, expected: bool) -> None:
    assert is_timeout_error(error) is expected


# Deaths


def _die(how: str) -> None:
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(3)


def _die_before_the_group(rank: Rank) -> None:
    if rank.rank == 1:
        _die("signal")
    rank.join_group("gloo", _TIMEOUT)


def _die_in_a_collective(rank: Rank) -> None:
    rank.join_group("gloo", _TIMEOUT)
    dist.barrier()
    if rank.rank == 1:
        _die("signal")
    dist.barrier()


def _die_while_rank_zero_sleeps(rank: Rank) -> None:
    rank.join_group("gloo", _TIMEOUT)
    if rank.rank == 1:
        _die("exit")
    with suppress(Exception):
        sleep_in_this_function()


@pytest.mark.usefixtures("recovers")
@pytest.mark.parametrize(
    ("function", "exit_code", "message"),
    [
        (_die_before_the_group, -9, r"Rank 1 died: .* killed by SIGKILL, .* memory runs out"),
        (_die_in_a_collective, -9, r"Rank 1 died: its process was killed by SIGKILL"),
        (_die_while_rank_zero_sleeps, 3, r"Rank 1 died: its process ended with exit code 3"),
    ],
    ids=["before the group", "in a collective", "while rank 0 sleeps"],
)
def test_death_of_a_worker_is_named(
    function: Callable[[Rank], Any], exit_code: int, message: str
) -> None:
    with soon(), pytest.raises(WorkerDiedError, match=message) as info:
        launch(function)
    assert (info.value.rank, info.value.exit_code) == (1, exit_code)


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_death_of_a_worker_ends_a_launch_in_another_thread() -> None:
    def die(rank: Rank) -> None:
        _die("signal")

    with ThreadPoolExecutor(1) as thread, soon():
        future = thread.submit(launch, die, local=loop_forever)
        with pytest.raises(WorkerDiedError, match="Rank 1 died"):
            future.result()


def test_worker_that_died_between_launches_is_replaced(eventually: Callable[..., None]) -> None:
    launch(sum_of_ranks)
    victim = default_pool().pids[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: victim not in default_pool().pids)
    assert launch(sum_of_ranks) == [1, 1]
    assert victim not in default_pool().pids


# Hangs


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
@pytest.mark.parametrize("hanging", [0, 1])
def test_hang_names_the_rank_and_shows_its_stack(hanging: int) -> None:
    def hang(rank: Rank) -> None:
        rank.join_group("gloo", _SHORT)
        if rank.rank == hanging:
            sleep_in_this_function()
        dist.barrier()

    with (
        soon(),
        pytest.raises(RankHungError, match=rf"more than .* s for rank {hanging}, at ") as info,
    ):
        launch(hang, timeout=_SHORT)
    assert info.value.ranks == (hanging,)
    assert "raise the strategy's `timeout`" in str(info.value)
    assert "in sleep_in_this_function" in str(info.value)


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_hang_after_rank_zero_has_finished() -> None:
    def hang(rank: Rank) -> None:
        if rank.rank == 1:
            sleep_in_this_function()

    with soon(), pytest.raises(RankHungError, match="for rank 1") as info:
        launch(hang, timeout=_SHORT)
    assert "in sleep_in_this_function" in str(info.value)


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_hang_in_native_code_says_so() -> None:
    """A rank that holds the interpreter's lock cannot show its stack."""

    def hang(rank: Rank) -> None:
        rank.join_group("gloo", _SHORT)
        if rank.rank == 1:
            ctypes.PyDLL(None).sleep(600)
        dist.barrier()

    with soon(), pytest.raises(RankHungError, match="for rank 1") as info:
        launch(hang, timeout=_SHORT)
    assert "no answer: it is probably in native code" in str(info.value)


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_hang_of_all_ranks_blames_the_sequence() -> None:
    def cross(rank: Rank) -> None:
        rank.join_group("gloo", _SHORT)
        dist.recv(torch.zeros(1), src=1 - rank.rank)

    with soon(), pytest.raises(RankHungError, match="same sequence of collectives") as info:
        launch(cross, timeout=_SHORT)
    assert info.value.ranks == ()
    for rank in range(2):
        assert re.search(rf"(?s)Python stack of rank {rank}:.*in cross", str(info.value))


@pytest.mark.slow
@pytest.mark.usefixtures("recovers")
def test_rank_that_comes_too_late_is_named() -> None:
    """It finds the connection closed by the rank that gave up."""

    def late(rank: Rank) -> None:
        rank.join_group("gloo", _SHORT)
        dist.barrier()
        if rank.rank == 1:
            time.sleep(3.0)
        dist.barrier()
        if rank.rank == 0:
            sleep_in_this_function()

    with soon(), pytest.raises(RankHungError, match="for rank 1") as info:
        launch(late, timeout=_SHORT)
    assert info.value.ranks == (1,)
    assert "in late" in str(info.value)


# The caller's own end


_PROGRAM = """
import os, signal, subprocess, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from lightning_mgpu.launch.pool import default_pool
from lightning_mgpu.launch.payload import Payload

def launch(function):
    with Payload(function) as remote:
        return default_pool().launch(
            function, remote, world_size=2, timeout=timedelta(minutes=30)
        )

def announce(*pids):
    print(*pids, flush=True)
"""

_SLEEPING_WORKER = """
def step(rank):
    rank.join_group("gloo", timedelta(minutes=30))
    if rank.rank == 1:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        announce(os.getpid(), child)
        time.sleep(600)
    dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("thread", ["main", "other"])
def test_no_worker_survives_a_killed_caller(thread: str) -> None:
    start = (
        "launch(step)"
        if thread == "main"
        else "threading.Thread(target=launch, args=[step]).start()"
    )
    with _program(_PROGRAM + _SLEEPING_WORKER + start) as (program, children):
        program.kill()
        program.wait()
        _, alive = psutil.wait_procs(children, timeout=_SETTLE_SECONDS)
        assert not alive


@pytest.mark.slow
def test_no_worker_survives_a_caller_killed_while_it_starts() -> None:
    code = """
threading.Thread(target=launch, args=[lambda rank: None]).start()
while not default_pool().pids:
    pass
announce(*default_pool().pids)
"""
    with _program(_PROGRAM + code) as (program, children):
        program.kill()
        program.wait()
        _, alive = psutil.wait_procs(children, timeout=_SOON)  # it imports first
        assert not alive


@pytest.mark.slow
def test_no_idle_worker_survives_the_callers_end() -> None:
    code = "launch(lambda rank: None); announce(*default_pool().pids); time.sleep(1)"
    with _program(_PROGRAM + code) as (program, children):
        assert program.wait(_SOON) == 0
        _, alive = psutil.wait_procs(children, timeout=_SETTLE_SECONDS)
        assert not alive


_OWN_HANDLER = """
class Stop(BaseException): pass
def stop(signum, frame): raise Stop
signal.signal(signal.SIGINT, stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "name"), [("", "KeyboardInterrupt"), (_OWN_HANDLER, "Stop")], ids=["python", "own"]
)
def test_ctrl_c_reaches_rank_zero_in_a_collective(handler: str, name: str) -> None:
    """The terminal sends it to the caller alone, and gloo waits without looking at signals."""
    attempt = """
try:
    launch(step)
except BaseException as error:
    print(type(error).__name__, len(default_pool().pids), dist.is_initialized())
"""
    with _program(_PROGRAM + _SLEEPING_WORKER + handler + attempt) as (program, children):
        time.sleep(0.5)  # rank 0 is on its way into the barrier
        program.send_signal(signal.SIGINT)
        with soon():
            output, _ = program.communicate(timeout=2 * _SOON)
        assert output == f"{name} 0 False\n"
        _, alive = psutil.wait_procs(children, timeout=_SETTLE_SECONDS)
        assert not alive


@contextmanager
def _program(code: str) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A running program, and the processes whose ids it has announced on its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdout is not None
            pids = [int(word) for word in program.stdout.readline().split()]
            assert pids
            yield program, [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        finally:
            program.kill()


def _open_payloads() -> list[str]:
    """The payload files that this process holds."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    return [file for file in files if file.startswith("/memfd:lightning_mgpu")]
