"""Monitor the ranks of a run, handle their requests, and find out which failed first."""

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import cloudpickle
from ray.exceptions import RayError

from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.ray.object_store import PackedObject

# How long to wait for somebody to name a cause when all that is known is that a peer was lost.
_CAUSE_SECONDS = 10.0
# How long rank 0 may take to notice that another rank has failed, and to close its files.
_LAST_WORDS_SECONDS = 2.0


class RunMonitor:
    """Monitor the ranks of one run until all are done or one has failed.

    Args:
        runs: The pending results, each with its rank.
        first: The actor of rank 0, which may have messages.
    """

    def __init__(self, runs: dict[Any, int], first: Any) -> None:
        # Futures, since `ray.wait` swallows what a signal's handler raises.
        self._runs = {run.future(): rank for run, rank in runs.items()}
        self._first = first
        self._results: dict[int, list[PackedObject]] = {}
        self._lost: dict[int, BaseException] = {}  # who reports no more than a lost peer
        self._give_up: float | None = None

    def outcomes(self) -> list[list[PackedObject]]:
        """Return values of the ranks, by rank; raises the first error."""
        message: Future[Any] | None = self._next_message()
        while self._runs or message is not None:
            waiting = [*self._runs, *([message] if message is not None else [])]
            ready, _ = wait(waiting, self._seconds_left(), FIRST_COMPLETED)
            if message is not None and message in ready:
                message = self._follow(message)
            for run in ready & self._runs.keys():
                self._take(run)
            if self._lost and (not self._runs or self._seconds_left() == 0.0):
                raise self._lost[min(self._lost)]
        return [self._results[rank] for rank in sorted(self._results)]

    def _next_message(self) -> "Future[Any]":
        future: Future[Any] = self._first.next_message.remote().future()
        return future

    def _follow(self, message: "Future[Any]") -> "Future[Any] | None":
        """Handle a request of rank 0; return the next thing to wait for."""
        try:
            asked = message.result()
        except RayError:
            return None  # its run will tell
        if asked is None:
            return None
        function, arguments, wants_answer = cloudpickle.loads(asked)
        result = function(*arguments)
        if wants_answer:
            self._first.take_answer.remote(cloudpickle.dumps(result))
        return self._next_message()

    def _take(self, run: "Future[Any]") -> None:
        rank = self._runs.pop(run)
        try:
            result, failure = run.result()
        except RayError as error:
            raise WorkerDiedError(rank, None) from error
        if failure is None:
            self._results[rank] = result
        elif failure.is_collective:
            self._lost[rank] = failure.restore(rank)
            self._give_up = self._give_up or time.monotonic() + _CAUSE_SECONDS
        else:
            self._let_first_finish()
            raise failure.restore(rank)

    def _let_first_finish(self) -> None:
        """Give rank 0 a moment to flush its loggers before the workers are stopped."""
        first = next((run for run, rank in self._runs.items() if rank == 0), None)
        if first is not None:
            wait([first], _LAST_WORDS_SECONDS)

    def _seconds_left(self) -> float | None:
        if self._give_up is None:
            return None
        return max(0.0, self._give_up - time.monotonic())
