"""Worker thread that runs jobs one after another and reports their outcomes."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from lightning_mgpu._compat.python import raise_in_thread
from lightning_mgpu.engine.context import ThreadContext

T = TypeVar("T")


class Cancelled(BaseException):
    """Raised inside a task whose peers have failed; no `Exception`, like `KeyboardInterrupt`."""


@dataclass
class ThreadJob:
    slot: int
    task: Callable[[], Any]
    context: ThreadContext
    events: "queue.SimpleQueue[tuple[int, Any]]"
    cancelled: bool = False


@dataclass
class TaskDone:
    value: Any


@dataclass
class TaskFailed:
    error: BaseException


@dataclass
class CallerRequest(Generic[T]):
    name: str
    function: Callable[[], T]
    _inbox: "queue.SimpleQueue[TaskDone | TaskFailed | ThreadJob]" = field(
        default_factory=queue.SimpleQueue
    )

    def lend(self, job: ThreadJob) -> None:
        """Have the waiting thread run a job."""
        self._inbox.put(job)

    def answer(self, reply: TaskDone | TaskFailed) -> None:
        self._inbox.put(reply)

    def wait(self) -> T:
        while isinstance(reply := self._inbox.get(), ThreadJob):
            _here.slot.execute(reply)
        if isinstance(reply, TaskFailed):
            raise reply.error
        value: T = reply.value
        return value


def on_caller(name: str, function: Callable[[], T]) -> T:
    """Inside a task: run `function` once for all tasks, in the thread that called `Workers.run`.

    Waits until every task of the run has come here.

    Args:
        name: What this is; must be the same in every task.
        function: Slot 0's is run.

    Returns:
        What it returned, to every task.

    Raises:
        LockstepError: Another task calls something else, or has ended.
        BaseException: What `function` raised, in every task.
    """
    job: ThreadJob = _here.job
    call = CallerRequest(name, function)
    job.events.put((job.slot, call))
    return call.wait()


def slot_here() -> int | None:
    """The slot whose thread calls; `None` in any other, such as autograd's for an accelerator."""
    slot = getattr(_here, "slot", None)
    return None if slot is None else slot.index


class Slot:
    """A worker thread and its queue."""

    def __init__(self, index: int, device: torch.device, threads: int) -> None:
        self.index = index
        self.device = device
        self.inbox: queue.SimpleQueue[ThreadJob | None] = queue.SimpleQueue()
        self.ready = threading.Event()
        self._threads = threads
        self._current: ThreadJob | None = None
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._main, name=f"mgpu-worker-{index}", daemon=True)
        self.thread.start()

    def cancel(self, job: ThreadJob) -> None:
        """Raise `Cancelled` in the job's task at its next step in Python, unless it is over."""
        with self._lock:
            job.cancelled = True
            if self._current is job:
                assert self.thread.ident is not None
                raise_in_thread(self.thread.ident, Cancelled)

    def _main(self) -> None:
        # A thread takes the process's setting over at its first parallel operation or query, and
        # would then forget its own.
        torch.get_num_threads()
        torch.set_num_threads(self._threads)
        _here.slot = self
        self.ready.set()
        while True:
            try:
                job = self.inbox.get()
                if job is None:
                    return
                self.execute(job)
                for _ in range(8):  # a cancellation that comes too late for its task arrives here
                    pass
            except Cancelled:
                pass
            finally:
                job = None  # hold nothing of the last task while waiting for the next

    def execute(self, job: ThreadJob) -> None:
        """Run a job in this thread and report its outcome; within another job, if that waits."""
        outer = self._current
        event: TaskDone | TaskFailed = TaskFailed(Cancelled())
        try:
            try:
                with self._lock:
                    if job.cancelled:
                        return
                    self._current = job
                _here.job = job
                with job.context.entered(self.device):
                    event = TaskDone(job.context.variables.copy().run(job.task))
            except BaseException as error:
                event = TaskFailed(error)
            finally:
                with self._lock:
                    self._current = outer
                _here.job = outer
        finally:
            job.events.put((job.slot, event))


_here = threading.local()
