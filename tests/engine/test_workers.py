"""Tasks on worker threads: what they inherit, how they fail, what they do together."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.worker_thread import on_caller
from lightning_mgpu.engine.workers import LockstepError, Workers

CPU = torch.device("cpu")


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers([CPU, CPU, CPU], threads=2)
    yield made
    made.close()


def test_slots_of_one_device_run_at_once(workers: Workers) -> None:
    barrier = threading.Barrier(3, timeout=60)
    identities = workers.run([lambda: (barrier.wait(), threading.get_ident())[1]] * 3)
    assert len({*identities, threading.get_ident()}) == 4


def test_results_come_in_the_order_of_slots(workers: Workers) -> None:
    first = threading.Event()

    def late() -> str:
        first.wait(60)
        return "late"

    def early() -> str:
        first.set()
        return "early"

    assert workers.run([late, early]) == ["late", "early"]


def test_threads_stay_the_same(workers: Workers) -> None:
    tasks: list[Callable[[], int]] = [threading.get_ident] * 3
    assert workers.run(tasks) == workers.run(tasks)


CONTEXTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference mode": (torch.inference_mode, torch.is_inference_mode_enabled),
    "autocast": (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
    ),
    "default device": (lambda: torch.device("meta"), lambda: torch.zeros(1).device),
    "anomaly detection": (torch.autograd.detect_anomaly, torch.is_anomaly_enabled),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", CONTEXTS)
def test_context_of_the_caller_reaches_the_task(workers: Workers, name: str) -> None:
    context, look = CONTEXTS[name]
    outside = look()
    with context():
        inside = look()
        assert workers.run([look]) == [inside]
    assert inside != outside
    assert workers.run([look]) == [outside]


def test_autocast_caches_no_weights(workers: Workers) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert workers.run([torch.is_autocast_cache_enabled]) == [False]


def test_default_dtype_and_determinism_reach_the_task(workers: Workers) -> None:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        looks = [lambda: torch.zeros(1).dtype, torch.are_deterministic_algorithms_enabled]
        assert workers.run(looks) == [torch.float64, True]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_threads_of_worker_and_caller_are_their_own(workers: Workers) -> None:
    before = torch.get_num_threads()
    assert workers.run([torch.get_num_threads] * 3) == [2, 2, 2]
    workers.run([lambda: torch.ones(1000, 1000).sum()] * 3)
    assert workers.run([torch.get_num_threads] * 3) == [2, 2, 2]
    assert torch.get_num_threads() == before


def test_error_has_the_frames_of_its_task_and_others_stop(workers: Workers) -> None:
    running = threading.Event()

    def endless() -> None:
        running.set()
        while True:
            pass

    def failing() -> None:
        running.wait(60)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken") as caught:
        workers.run([endless, failing, endless])
    assert traceback.extract_tb(caught.tb)[-1].name == "failing"
    assert workers.run([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]


def test_cancelled_task_may_clean_up(workers: Workers) -> None:
    running, cleaned = threading.Event(), threading.Event()

    def endless() -> None:
        try:
            running.set()
            while True:
                pass
        finally:
            cleaned.set()

    def failing() -> None:
        running.wait(60)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        workers.run([endless, failing])
    assert cleaned.is_set()


def test_thread_that_does_not_stop_is_given_up(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_mgpu.engine.workers._ERROR_SECONDS", (0.1, 0.1))
    release = threading.Event()

    def failing() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        workers.run([release.wait, failing])
    assert "The task on slot 0 (cpu) does not stop" in caplog.text
    assert workers.run([lambda: 1]) == [1]
    release.set()


def test_interrupt_of_the_caller_cancels_tasks(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    def interrupt() -> None:
        def raise_it() -> None:
            raise KeyboardInterrupt

        on_caller("anything", raise_it)

    with pytest.raises(KeyboardInterrupt):
        workers.run([interrupt])
    with pytest.raises(KeyboardInterrupt):
        workers.run([lambda: _interrupt_main(), endless])
    assert ended.wait(5)


def _interrupt_main() -> None:
    import _thread

    _thread.interrupt_main()
    while True:
        time.sleep(0.01)


def test_nothing_of_a_task_is_kept(workers: Workers) -> None:
    import gc
    import weakref

    class Result:
        pass

    result = Result()
    seen = weakref.ref(result)
    workers.run([lambda kept=result: kept])  # type: ignore[misc]
    del result
    gc.collect()
    deadline = time.monotonic() + 5
    while seen() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread is on its way back to waiting
    assert seen() is None


def test_workers_are_copied_without_their_threads(workers: Workers) -> None:
    import pickle

    workers.run([lambda: 1])
    copied = pickle.loads(pickle.dumps(workers))
    assert copied.run([lambda: 2]) == [2]
    copied.close()


# Lockstep


def test_calls_of_all_tasks_are_made_once_by_the_caller(workers: Workers) -> None:
    made: list[int] = []

    def task(slot: int) -> tuple[int, int]:
        first = on_caller("first", lambda: made.append(slot) or threading.get_ident())
        second = on_caller("second", lambda: made.append(slot + 10) or slot)
        return first, second

    results = workers.run([lambda: task(0), lambda: task(1)])
    assert results == [(threading.get_ident(), 0)] * 2
    assert made == [0, 10]


def test_calls_may_run_tasks_on_the_threads_that_wait(workers: Workers) -> None:
    def task() -> list[int]:
        inner: list[Callable[[], int]] = [threading.get_ident, threading.get_ident]
        return on_caller("call", lambda: workers.run(inner))

    identities = workers.run([threading.get_ident] * 2)
    assert workers.run([task, task]) == [identities, identities]


def test_calls_within_calls(workers: Workers) -> None:
    def inner(slot: int) -> str:
        return on_caller("inner", lambda: f"inner {slot}")

    def task() -> list[str]:
        return on_caller("outer", lambda: workers.run([lambda: inner(0), lambda: inner(1)]))

    assert workers.run([task, task]) == [["inner 0", "inner 0"]] * 2


def test_error_of_a_call_is_raised_where_it_was_called(workers: Workers) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the call")

    def task() -> str:
        try:
            on_caller("call", fail)
        except ZeroDivisionError as error:
            return str(error)
        return "nothing"

    assert workers.run([task, task]) == ["in the call"] * 2


def test_tasks_that_call_different_things_are_refused(workers: Workers) -> None:
    with pytest.raises(LockstepError, match=r"`step` \(task 0\), `backward` \(task 1\)"):
        workers.run([lambda: on_caller("step", int), lambda: on_caller("backward", int)])
    assert workers.run([lambda: 1]) == [1]


def test_task_that_ends_while_others_call_is_refused(workers: Workers) -> None:
    with pytest.raises(LockstepError, match=r"Task 1 calls `step`.*but task 0 has ended"):
        workers.run([lambda: None, lambda: on_caller("step", int)])
    assert workers.run([lambda: 1]) == [1]


@pytest.fixture
def recorded() -> Iterator[tuple[nn.Module, Recorder]]:
    layer = nn.BatchNorm1d(2)
    recorder = Recorder([layer])
    recorder.attach()
    yield layer, recorder
    recorder.detach()


def test_batch_norm_in_a_thread_of_nobody_counts(
    workers: Workers, recorded: tuple[nn.Module, Recorder]
) -> None:
    layer, recorder = recorded
    workers.run([lambda: layer(torch.randn(4, 2))])
    # Autograd has threads of its own for accelerators, in which it may compute again.
    with ThreadPoolExecutor(1) as executor:
        executor.submit(layer, torch.randn(4, 2)).result()
    assert len(recorder.take()[0]) == 2


def test_batch_norm_in_the_thread_of_another_slot_is_refused(
    workers: Workers, recorded: tuple[nn.Module, Recorder]
) -> None:
    layer, _ = recorded
    workers.run([lambda: layer(torch.randn(4, 2))])
    with pytest.raises(RuntimeError, match="is called in the step of another"):
        workers.run([lambda: None, lambda: layer(torch.randn(4, 2))])
