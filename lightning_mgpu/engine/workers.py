"""Run tasks in parallel, on one persistent thread per slot; the first error is raised."""

import logging
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch

from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.worker_thread import (
    CallerRequest,
    Cancelled,
    Slot,
    TaskDone,
    TaskFailed,
    ThreadJob,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

# After an error or Ctrl-C, how long the other tasks may go on before they are cancelled (most come
# to their end, and an exception out of nowhere may find them holding a lock), and how long they
# may take over it before their threads are given up.
_ERROR_SECONDS = (1.0, 10.0)
_INTERRUPT_SECONDS = (0.2, 0.5)
_JOIN_SECONDS = 1.0
# A signal that comes just before its thread begins to wait is only seen when that wakes up.
_SIGNAL_SECONDS = 0.1


class LockstepError(RuntimeError):
    """Tasks that must make the same calls in the same order did not."""


class Workers:
    """Threads that run one task each, slot by slot.

    Slots, not devices: two slots on ``cpu`` are two threads that run at once. Every task runs in
    the caller's thread-local context (gradient mode, autocast, ...) with the slot's device current.

    Args:
        devices: The device of each slot.
        threads: Intra-op threads of each worker; default: the machine's cores shared out evenly,
            at least one.
    """

    def __init__(self, devices: Sequence[torch.device], threads: int | None = None) -> None:
        self.devices = list(devices)
        self._threads = threads or max(1, available_cores() // max(1, len(self.devices)))
        self._slots: list[Slot] = []
        self._parked: list[CallerRequest[Any]] = []

    def run(
        self,
        tasks: Sequence[Callable[[], T]],
        around_calls: Callable[[], AbstractContextManager[Any]] = nullcontext,
        abandon: Callable[[], object] = lambda: None,
    ) -> list[T]:
        """Run one task per slot, from slot 0 on, and wait for all.

        Meanwhile the calling thread serves `on_caller`. What it calls may itself run tasks here:
        they are run by the threads of the tasks that wait for it.

        Args:
            tasks: At most as many as there are slots.
            around_calls: A context in which the calling thread does so.
            abandon: Called when a task has failed: has those end that wait for others.

        Returns:
            The results, in order.

        Raises:
            BaseException: The first error of any task, with its own traceback. The other tasks are
                over: they were cancelled if they took long, and given up if that did not help.
            LockstepError: Tasks disagree about what to call in lockstep.
        """
        self._start()
        run = _TaskGroup(self, around_calls)
        try:
            run.start(tasks)
            run.wait()
        except BaseException as error:
            abandon()
            interrupted = isinstance(error, KeyboardInterrupt)
            self._give_up(run.stop(*(_INTERRUPT_SECONDS if interrupted else _ERROR_SECONDS)))
            raise
        return run.results()

    def close(self) -> None:
        """Stop the threads. The workers can be used again."""
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.inbox.put(None)
        for slot in slots:
            slot.thread.join(_JOIN_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": [], "_parked": []}  # threads stay with their process

    def _submit(self, job: "ThreadJob") -> None:
        if self._parked:
            self._parked[job.slot].lend(job)
        else:
            self._slots[job.slot].inbox.put(job)

    @contextmanager
    def _lent(self, calls: "list[CallerRequest[Any]]") -> Iterator[None]:
        before, self._parked = self._parked, calls
        try:
            yield
        finally:
            self._parked = before

    def _start(self) -> None:
        if any(not slot.thread.is_alive() for slot in self._slots):
            self._slots = []  # we are a forked child
        if self._slots:
            return
        callers = torch.get_num_threads()
        self._slots = [Slot(i, d, self._threads) for i, d in enumerate(self.devices)]
        for slot in self._slots:
            slot.ready.wait()
        # What a thread sets is also what threads to come begin with.
        torch.set_num_threads(callers)

    def _give_up(self, stuck: Sequence["Slot"]) -> None:
        if not stuck:
            return
        log.warning(
            "The task on %s does not stop; its thread keeps running.",
            ", ".join(f"slot {slot.index} ({slot.device})" for slot in stuck),
        )
        for slot in self._slots:
            slot.inbox.put(None)
        self._slots = []


def available_cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _TaskGroup:
    """State of one `Workers.run` call."""

    def __init__(
        self,
        workers: Workers,
        around_calls: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._workers = workers
        # A queue of this run's own: whatever a thread that was given up still has to say is lost.
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._around_calls = around_calls
        self._results: dict[int, Any] = {}
        self._calls: dict[int, CallerRequest[Any]] = {}
        self._busy: dict[int, tuple[Slot, ThreadJob]] = {}

    def start(self, tasks: Sequence[Callable[[], Any]]) -> None:
        assert len(tasks) <= len(self._workers.devices), (tasks, self._workers.devices)
        context = ThreadContext.capture(self._workers.devices)
        for index, task in enumerate(tasks):
            job = ThreadJob(index, task, context, self._events)
            # Known before it runs, so that Ctrl-C in between finds it.
            self._busy[index] = (self._workers._slots[index], job)
            self._workers._submit(job)

    def wait(self) -> None:
        while self._busy:
            try:
                slot, event = self._events.get(timeout=_SIGNAL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(event, CallerRequest):
                self._calls[slot] = event
            else:
                del self._busy[slot]
                if isinstance(event, TaskFailed):
                    raise event.error
                self._results[slot] = event.value
            if self._calls:
                self._serve()

    def results(self) -> list[Any]:
        return [value for _, value in sorted(self._results.items())]

    def stop(self, grace: float, seconds: float) -> list["Slot"]:
        """Wait until no task runs, and after `grace` seconds cancel those that do.

        Returns:
            The slots whose tasks have not ended some `seconds` after that.
        """
        with suppress(KeyboardInterrupt):  # once more: no more patience
            self._drain(grace)
            for slot, job in self._busy.values():
                slot.cancel(job)
            self._drain(seconds)
        return [slot for slot, _ in self._busy.values()]

    def _drain(self, seconds: float) -> None:
        """Wait for tasks, and release those that wait for others."""
        deadline = time.monotonic() + seconds
        while self._busy:
            for call in self._calls.values():
                call.answer(TaskFailed(Cancelled()))
            self._calls.clear()
            try:
                index, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(event, CallerRequest):
                self._calls[index] = event
            else:
                del self._busy[index]

    def _serve(self) -> None:
        """Answer the tasks' calls once all have arrived."""
        if self._results:
            index, call = next(iter(self._calls.items()))
            ended = ", ".join(map(str, sorted(self._results)))
            raise LockstepError(
                f"Task {index} calls `{call.name}`, which all tasks must call together, but task"
                f" {ended} has ended without doing so."
            )
        if len(self._calls) < len(self._busy):
            return
        calls = [call for _, call in sorted(self._calls.items())]
        names = [call.name for call in calls]
        if len(set(names)) > 1:
            raise LockstepError(
                "All tasks must make the same calls in the same order, but they call "
                + ", ".join(f"`{name}` (task {i})" for i, name in enumerate(names))
                + "."
            )
        reply: TaskDone | TaskFailed
        try:
            with self._workers._lent(calls), self._around_calls():
                reply = TaskDone(calls[0].function())
        except Exception as error:  # raised where the task called, whose code may know what to do
            reply = TaskFailed(error)
        self._calls.clear()
        for call in calls:
            call.answer(reply)
