"""Launches that go well: what they return, what travels, what stays as it was."""

import functools
import gc
import importlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.launch.payload import Payload
from lightning_mgpu.launch.pool import WorkerPool, _FixedState, default_pool
from lightning_mgpu.launch.process_state import threads_per_rank
from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.launch.rank_variables import RANK_VARIABLES, of_rank

_TIMEOUT = timedelta(minutes=30)

# What a program of a user's needs to launch anything; for interpreters of their own.
_PROGRAM = """
import os
from datetime import timedelta
import torch
import torch.distributed as dist
from lightning_mgpu.launch.pool import default_pool
from lightning_mgpu.launch.payload import Payload

def launch(function, world_size=2):
    with Payload(function) as remote:
        return default_pool().launch(
            function, remote, world_size=world_size, timeout=timedelta(minutes=30)
        )
"""


def launch(
    function: Callable[[Rank], Any],
    world_size: int = 2,
    *,
    local: Callable[[Rank], Any] | None = None,
    pool: WorkerPool | None = None,
    **options: Any,
) -> list[Any]:
    """Run `function` on all ranks, or `local` in its place on rank 0."""
    with Payload(function) as remote:
        return (pool or default_pool()).launch(
            local or function, remote, world_size=world_size, timeout=_TIMEOUT, **options
        )


def on_worker(probe: Callable[[], Any]) -> Any:
    """What `probe` returns on rank 1."""
    return launch(lambda rank: probe() if rank.rank == 1 else None)[1]


def rank_and_pid(rank: Rank) -> tuple[int, int]:
    return rank.rank, os.getpid()


def sum_of_ranks(rank: Rank) -> int:
    rank.join_group("gloo", _TIMEOUT)
    value = torch.tensor(rank.rank)
    dist.all_reduce(value)
    return int(value)


class Doubler:
    """A callable whose class is defined in a module."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, rank: Rank) -> int:
        return self.factor * rank.rank


class Stop(Exception):
    """An exception that some tests declare to be a normal end."""


class Witness:
    """Remembers at unpickling what `note_rank` wrote down before."""

    def __reduce__(self) -> tuple[Callable[[str], str | None], tuple[str]]:
        return os.getenv, ("NOTED_RANK",)


def note_rank(rank: Rank) -> None:
    os.environ["NOTED_RANK"] = str(rank.rank)


@pytest.fixture
def random_states() -> Iterator[None]:
    """Puts the generators of torch, Python and NumPy back."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


# Results and workers


@pytest.mark.parametrize("world_size", [3, 2, 1])
def test_results_come_by_rank(world_size: int) -> None:
    ranks = launch(lambda rank: (rank.rank, rank.world_size), world_size)
    assert ranks == [(rank, world_size) for rank in range(world_size)]


def test_workers_serve_later_launches() -> None:
    launches = [launch(rank_and_pid, world_size) for world_size in (3, 2, 1, 3)]
    for results in launches:
        assert results == launches[0][: len(results)]
    assert launches[0][0] == (0, os.getpid())
    assert [pid for _, pid in launches[0][1:]] == default_pool().pids[:2]


@pytest.mark.parametrize("kind", ["function", "lambda", "closure", "partial", "instance", "method"])
def test_function_may_be_any_callable(kind: str) -> None:
    def closure(rank: Rank) -> int:
        return factor * rank.rank

    factor = 2
    function: Any = {
        "function": rank_and_pid,
        "lambda": lambda rank: 2 * rank.rank,
        "closure": closure,
        "partial": functools.partial(lambda rank, factor: factor * rank.rank, factor=2),
        "instance": Doubler(2),
        "method": Doubler(2).__call__,
    }[kind]
    result = launch(function)[1]
    assert result == ((1, default_pool().pids[0]) if kind == "function" else 2)


def test_class_of_a_result_is_the_callers_own() -> None:
    class Result:
        def __init__(self, rank: int) -> None:
            self.rank = rank

    results = launch(lambda rank: Result(rank.rank))
    assert [type(result) for result in results] == [Result, Result]


def test_tensors_of_a_result_come_whole() -> None:
    results = launch(lambda rank: {"x": torch.full((100_000,), float(rank.rank))})
    assert [float(result["x"].sum()) for result in results] == [0.0, 100_000.0]
    results[1]["x"].add_(1)  # an ordinary, writable tensor


@pytest.mark.slow
def test_class_redefined_in_an_interpreter_counts() -> None:
    """In an interpreter without a script file, everything of `__main__` goes by value."""
    program = (
        _PROGRAM
        + """
for version in (1, 2):
    exec(f'''
class Model:
    version = {version}
    def __call__(self, rank):
        return rank.rank, type(self).version, helper()
def helper():
    return "helper {version}"
''')
    print(launch(Model()))
"""
    )
    assert _run_program(program) == (
        "[(0, 1, 'helper 1'), (1, 1, 'helper 1')]\n[(0, 2, 'helper 2'), (1, 2, 'helper 2')]\n"
    )


@pytest.mark.slow
def test_two_programs_run_at_the_same_time() -> None:
    program = (
        _PROGRAM
        + """
def step(rank):
    rank.join_group("gloo", timedelta(minutes=30))
    value = torch.tensor(rank.rank + 1)
    for _ in range(50):
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
print([launch(step) for _ in range(5)])
"""
    )
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(_run_program, [program] * 2))
    assert outputs == [f"{[[2, 2]] * 5}\n"] * 2


def test_prepare_runs_before_anything_is_unpickled() -> None:
    witness = Witness()
    results = launch(lambda rank: witness, prepare=note_rank)
    assert results == [witness, "1"]


# State that travels


def _set_environment(value: str | None) -> None:
    if value is None:
        del os.environ["MGPU_TEST"]
    else:
        os.environ["MGPU_TEST"] = value


def _set_default_device(device: Any) -> None:
    torch.set_default_device(None if str(device) == "cpu" else device)


def _set_warning_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters
    warnings._filters_mutated()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# What to read, how to set it, another value.
_STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "environment": (lambda: os.environ.get("MGPU_TEST"), _set_environment, "a=b ä"),
    "directory": (os.getcwd, os.chdir, "/"),
    "sys.path": (
        lambda: list(sys.path),
        functools.partial(sys.path.__setitem__, slice(None)),
        [*sys.path, "/nowhere"],
    ),
    "sys.argv": (
        lambda: list(sys.argv),
        functools.partial(sys.argv.__setitem__, slice(None)),
        ["prog", "--x=1"],
    ),
    "umask": (_umask, os.umask, 0o027),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": (torch.get_default_device, _set_default_device, "meta"),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        True,
    ),
    "cudnn benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        functools.partial(setattr, torch.backends.cudnn, "benchmark"),
        True,
    ),
    "matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "medium",
    ),
    "log level": (
        lambda: logging.getLogger("mgpu.test").level,
        logging.getLogger("mgpu.test").setLevel,
        37,
    ),
    "root log level": (lambda: logging.root.level, logging.root.setLevel, logging.CRITICAL),
    "warning filters": (
        lambda: list(warnings.filters),
        _set_warning_filters,
        [("error", None, FutureWarning, None, 0)],
    ),
}


@pytest.mark.parametrize("name", _STATE)
def test_state_reaches_the_worker_and_goes_again(name: str) -> None:
    probe, change, value = _STATE[name]
    before = probe()
    change(value)
    try:
        there, here = on_worker(probe), probe()
    finally:
        change(before)
    assert there == here != before
    assert on_worker(probe) == probe() == before


def _rank_variables(_rank: Rank) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in RANK_VARIABLES}


def test_rank_variables_do_not_travel_but_are_those_of_each_rank() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.setenv(name, "5")
        here, *there = launch(_rank_variables, 3)
        assert {name: here[name] for name in of_rank(Rank(0, 3))} == of_rank(Rank(0, 3))
        assert there == [of_rank(Rank(1, 3)), of_rank(Rank(2, 3))]
        assert set(_rank_variables(Rank(0, 1)).values()) == {"5"}


def _draw(_rank: Rank) -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(np.random.rand())


@pytest.mark.usefixtures("random_states")
def test_seeded_ranks_draw_the_same_numbers() -> None:
    def draw_after_seeding() -> list[tuple[float, float, float]]:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        return launch(_draw, 3)

    first = draw_after_seeding()
    assert first[0] == first[1] == first[2]
    assert draw_after_seeding() == first


@pytest.mark.usefixtures("random_states")
def test_unseeded_ranks_draw_different_numbers_of_torch_only() -> None:
    """Python and NumPy cannot tell whether they were seeded, and splits of data have to agree."""
    torch.manual_seed(7)
    launch(_draw, 3)  # the workers were seeded once
    torch.seed()
    draws = [*launch(_draw, 3), *launch(_draw, 3)]
    of_torch, *others = zip(*draws, strict=True)
    assert len(set(of_torch)) == len(draws)
    for numbers in others:
        assert len(set(numbers[:3])) == len(set(numbers[3:])) == 1
        assert numbers[0] != numbers[3]


# Process group


def test_collectives_work_and_leave_no_group() -> None:
    hook = sys.excepthook
    for world_size in (2, 3, 2):
        assert launch(sum_of_ranks, world_size) == [sum(range(world_size))] * world_size
        assert not dist.is_initialized()
        assert sys.excepthook is hook
    assert on_worker(lambda: (dist.is_initialized(), sys.excepthook is sys.__excepthook__)) == (
        False,
        True,
    )


def test_group_of_one_rank_works() -> None:
    assert launch(sum_of_ranks, 1) == [0]


def test_rank_without_a_group_beside_ranks_with_one() -> None:
    """A function that returns before it joins is no failure as long as nobody waits for it."""
    assert launch(lambda rank: rank.rank, local=lambda rank: "early") == ["early", 1]


# What stays as it was


def test_thread_count_is_shared_out_and_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = threads_per_rank(2)
        assert launch(lambda rank: torch.get_num_threads()) == [expected, expected]
        assert torch.get_num_threads() == 2
        launch(lambda rank: torch.set_num_threads(5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_signal_handling_is_put_back() -> None:
    handlers = [signal.getsignal(signum) for signum in signal.valid_signals()]
    launch(rank_and_pid)
    assert [signal.getsignal(signum) for signum in signal.valid_signals()] == handlers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_many_launches_leave_nothing_behind(eventually: Callable[..., None]) -> None:
    def step(rank: Rank) -> torch.Tensor:
        rank.join_group("gloo", _TIMEOUT)
        value = torch.ones(100_000) * rank.rank
        dist.all_reduce(value)
        return value

    def measure() -> list[tuple[int, int, int]]:
        gc.collect()
        processes = [psutil.Process(pid) for pid in [os.getpid(), *default_pool().pids[:1]]]
        return [(p.num_threads(), p.num_fds(), p.memory_info().rss) for p in processes]

    for _ in range(10):
        launch(step)
    before = measure()
    for _ in range(50):
        launch(step)

    def has_not_grown() -> bool:  # a thread of the last launch may be on its way out
        return all(
            threads_after <= threads and files_after <= files and memory_after - memory < 50 * 2**20
            for (threads, files, memory), (threads_after, files_after, memory_after) in zip(
                before, measure(), strict=True
            )
        )

    eventually(has_not_grown)


def test_forked_child_leaves_the_workers_alone() -> None:
    before = launch(rank_and_pid)
    child = os.fork()
    if child == 0:
        try:
            default_pool().close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert launch(rank_and_pid) == before


# What workers do after a launch


def leave_slow_garbage(path: Path, seconds: float = 0.5) -> Callable[[Rank], None]:
    """A function that leaves rank 1 something to clean up, at whose end `path` exists."""

    class Slow:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            time.sleep(seconds)
            path.touch()

    def function(rank: Rank) -> None:
        if rank.rank == 1:
            Slow()

    return function


def test_workers_clean_up_while_the_caller_goes_on(
    tmp_path: Path, eventually: Callable[..., None]
) -> None:
    path = tmp_path / "cleaned"
    launch(rank_and_pid)
    launch(leave_slow_garbage(path))
    assert not path.exists()
    eventually(path.exists)


def test_next_launch_waits_until_the_workers_have_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "cleaned"
    before = launch(rank_and_pid)
    launch(leave_slow_garbage(path))
    assert launch(lambda rank: path.exists()) == [True, True]
    assert launch(rank_and_pid) == before


def test_closing_waits_until_the_workers_have_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "cleaned"
    pool = WorkerPool()
    launch(leave_slow_garbage(path), pool=pool)
    pool.close()
    assert path.exists()


def test_worker_that_dies_while_it_cleans_up_is_replaced(tmp_path: Path) -> None:
    pool = WorkerPool()
    try:
        launch(leave_slow_garbage(tmp_path / "cleaned", 60.0), pool=pool)
        first = pool.pids[0]
        os.kill(first, signal.SIGKILL)
        assert launch(rank_and_pid, pool=pool)[1] != (1, first)
    finally:
        pool.close()


def test_worker_that_does_not_come_to_rest_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_mgpu.launch.pool._CLEANUP_SECONDS", 0.2)
    pool = WorkerPool()
    try:
        launch(leave_slow_garbage(tmp_path / "cleaned", 60.0), pool=pool)
        first = pool.pids[0]
        assert launch(rank_and_pid, pool=pool)[1] != (1, first)
        assert "did not finish cleaning up" in caplog.text
    finally:
        pool.close()


# Where a launch may happen


def test_launch_from_another_thread() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(launch, sum_of_ranks, 2).result() == [1, 1]


def test_workers_outlive_the_thread_that_started_them() -> None:
    pool = WorkerPool()
    try:
        first = _in_new_thread(lambda: launch(rank_and_pid, pool=pool))
        assert first[1] == (1, pool.pids[0])
        assert _in_new_thread(lambda: launch(rank_and_pid, pool=pool)) == first
    finally:
        pool.close()
    assert pool.pids == []


@pytest.mark.parametrize("where", ["same thread", "other thread"])
def test_launch_during_a_launch_is_refused(where: str) -> None:
    call = _in_new_thread if where == "other thread" else _call

    def second_launch(_rank: Rank) -> str:
        with pytest.raises(LaunchError, match="Another launch is running in this process"):
            call(lambda: launch(rank_and_pid))
        return "refused"

    assert launch(lambda rank: rank.rank, local=second_launch) == ["refused", 1]


def test_launch_inside_a_worker_is_refused() -> None:
    def nested(rank: Rank) -> str:
        if rank.rank == 0:
            return ""
        try:
            launch(rank_and_pid)
        except LaunchError as error:
            return str(error)
        return "went through"

    message = launch(nested)[1]
    assert "itself a worker" in message
    assert "`devices=1`" in message


def test_foreign_process_group_is_refused() -> None:
    before = launch(rank_and_pid)
    hook = sys.excepthook
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match="group has been initialised already, by other code"):
            launch(rank_and_pid)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
    assert launch(rank_and_pid) == before


# Normal ends by exception


@pytest.mark.parametrize("stopping", [(0,), (1,), (0, 1)], ids=str)
def test_normal_exit_is_no_failure(stopping: tuple[int, ...]) -> None:
    def stop(rank: Rank) -> int:
        if rank.rank in stopping:
            raise Stop(f"on rank {rank.rank}")
        return rank.rank

    workers = launch(rank_and_pid)
    if 0 in stopping:
        with pytest.raises(Stop, match="on rank 0"):
            launch(stop, normal_exit=(Stop,))
    else:
        assert launch(stop, normal_exit=(Stop,)) == [0, None]
    assert launch(rank_and_pid) == workers


# What needs new workers


def test_reloaded_module_needs_new_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was first imported when the workers were up already."""
    workers = launch(rank_and_pid)
    source = tmp_path / "mgpu_reloaded.py"
    source.write_text("def function(rank):\n    return 'old'\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mgpu_reloaded")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert launch(module.function) == ["old", "old"]
    assert launch(rank_and_pid) == workers
    source.write_text("def function(rank):\n    return 'newer'\n")
    importlib.reload(module)
    assert launch(module.function) == ["newer", "newer"]
    assert launch(rank_and_pid) != workers


def test_conditions_tell_a_reloaded_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mgpu_known.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mgpu_known")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = _FixedState()
    assert before.still_hold(_FixedState())
    importlib.reload(module)
    assert not before.still_hold(_FixedState())
    monkeypatch.delitem(sys.modules, module.__name__)
    assert before.still_hold(_FixedState())


def test_frozen_variable_needs_new_workers() -> None:
    before = launch(rank_and_pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert on_worker(lambda: os.environ.get("CUDA_VISIBLE_DEVICES")) == "0"
        assert launch(rank_and_pid) != before


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _in_new_thread(function: Callable[[], Any]) -> Any:
    """The function's result, or its exception, from a thread that has ended by then."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(function)
    return future.result()


def _run_program(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
