"""Monitor one launch from a thread, and stop it at the first failure."""

import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_mgpu.launch import protocol
from lightning_mgpu.launch.errors import RemoteFailure
from lightning_mgpu.launch.handle import WorkerHandle
from lightning_mgpu.launch.interrupt import Interrupted, Interrupter
from lightning_mgpu.launch.position import Observer
from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.launch.watchdog import Watchdog

# A lost peer breaks everybody's collectives at once: wait for the rank that knows the reason.
_CAUSE_SECONDS = 2.0
# What rank 0 gets to notice by itself that its peers are gone, before it is interrupted.
_NOTICE_SECONDS = 1.0
# What it then gets for its own `finally` blocks, before it is interrupted once more.
_CLEANUP_SECONDS = 30.0
_STACK_SECONDS = 1.0
# A rank that waits when another gives up finds the connection closed at once, one that comes later
# when it comes.
_AT_ONCE_SECONDS = 0.5
# A handler of somebody's own may well let the current batch come to its end.
_PATIENCE_SECONDS = 10.0

_STOP, _LOOK = b"s", b"l"


class LaunchMonitor:
    """Collect the workers' answers and find the cause of a failed launch.

    Whatever goes wrong ends in one conclusion: every worker is killed, the rendezvous closed (so
    that nobody waits for them) and rank 0's thread, if it still runs its function, interrupted.

    Args:
        workers: The workers of this launch, by rank.
        interrupter: The way into rank 0's thread.
        timeout: The collectives' timeout in seconds, for the message.
        unblock: Called at the conclusion to free ranks that wait for a peer.
        hang_timeout: As for `WorkerPool.launch`.
    """

    def __init__(
        self,
        workers: dict[int, WorkerHandle],
        interrupter: Interrupter,
        timeout: float,
        unblock: Callable[[], None],
        hang_timeout: float | None = None,
    ) -> None:
        self._workers = workers
        self._interrupter = interrupter
        self._timeout = timeout
        self._unblock = unblock
        self._changed = threading.Condition()
        self._answers: dict[type[Any], dict[int, int | None]] = {}
        self._files: list[int] = []
        self._failures: dict[int, RemoteFailure | BaseException] = {}
        self._failed_at: dict[int, float] = {}
        self._missing: tuple[int, ...] = ()
        self._conclusion: BaseException | None = None
        self._observer = Observer(threading.get_ident())
        self._watchdog = Watchdog(workers, self._observer, timeout, hang_timeout)
        self._rank_zero_busy = False
        self._rank_zero_freed = False
        self._deadlines: dict[Callable[[], None], float] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="mgpu-watch", daemon=True)
        # One byte ends the watch, the other makes it look at its deadlines again.
        self._control_reader, self._control_writer = os.pipe()

    def __enter__(self) -> "LaunchMonitor":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        os.close(self._control_reader)
        os.close(self._control_writer)
        for file in self._files:
            os.close(file)

    def stop(self) -> None:
        """Take no more messages. May be called twice."""
        if self._thread.is_alive():
            os.write(self._control_writer, _STOP)
            self._thread.join()

    def answered(self, kind: type[Any]) -> set[int]:
        """The ranks that have sent a `kind` so far."""
        with self._changed:
            return set(self._answers.get(kind, {}))

    def collect(self, kind: type[Any], seconds: float) -> dict[int, int]:
        """Wait until every worker has sent a `kind`; return the files received, by rank.

        The files are closed with the watch.

        Raises:
            BaseException: The launch's conclusion, if it failed meanwhile or within `seconds`.
        """
        if not self.wait_for(kind, seconds):
            with self._changed:
                self._after(0.0, self._look_for_the_cause)
                self._wait_for_conclusion()
        with self._changed:
            if self._conclusion is not None:
                raise self._conclusion
            answers = self._answers.get(kind, {})
            return {rank: file for rank, file in answers.items() if file is not None}

    def wait_for(self, kind: type[Any], seconds: float) -> bool:
        """Wait for a `kind` from every worker or a failure; return `False` on timeout."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._conclusion is not None
                    or len(self._answers.get(kind, {})) == len(self._workers)
                ),
                seconds,
            )

    def rank_zero(self, function: Callable[[Rank], Any], rank: Rank) -> Any:
        """Run rank 0's part, `function`, in this thread.

        Raises:
            BaseException: What `function` raised, or the first cause if that lies on another rank.
        """
        try:
            try:
                with self._changed:
                    self._rank_zero_busy = True
                    self._after(self._watchdog.interval, self._watch)
                with self._observer.observing(function):
                    result = function(rank)
            finally:
                with self._changed:
                    self._rank_zero_busy = False
        except BaseException as error:
            cause = self._cause_of(error)
            if cause is error:
                raise
            raise cause from (cause.__cause__ or error)
        with self._changed:
            if self._conclusion is not None:
                raise self._conclusion
        return result

    def _cause_of(self, error: BaseException) -> BaseException:
        facts = RemoteFailure.of(error)
        with self._changed:
            if self._rank_zero_freed and not isinstance(error, Interrupted):
                return error  # what it was freed for; that the workers died is our doing
            if self._conclusion is None and not facts.is_collective:
                return error
            if self._conclusion is None:
                self._report(0, error, facts)
            return self._wait_for_conclusion()

    def _wait_for_conclusion(self) -> BaseException:
        self._changed.wait_for(lambda: self._conclusion is not None)
        assert self._conclusion is not None
        return self._conclusion

    # From here on everything runs in the watching thread, or with the lock held.

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # nobody else would ever end the launch
            with self._changed:
                self._conclude(error)

    def _follow(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control_reader, selectors.EVENT_READ, self._on_control)
            selector.register(self._interrupter.wakeup, selectors.EVENT_READ, self._on_signals)
            for rank, worker in self._workers.items():
                on_message = partial(self._on_message, rank)
                selector.register(worker.channel, selectors.EVENT_READ, on_message)
            while not self._stopped:
                for key, _ in selector.select(self._seconds_to_deadline()):
                    if not key.data():
                        selector.unregister(key.fileobj)
                self._meet_deadlines()

    def _on_control(self) -> bool:
        self._stopped = _STOP in os.read(self._control_reader, 64)
        return True

    def _on_message(self, rank: int) -> bool:
        """Handle a worker's message; return whether more can come."""
        try:
            message, file = self._workers[rank].channel.receive()
        except EOFError:
            if self._conclusion is None:
                error = self._watchdog.death_of(rank)
                with self._changed:
                    if rank not in self._failures:
                        self._conclude(error)
            return False
        with self._changed:
            if isinstance(message, protocol.Failed):
                self._report(rank, message.failure, message.failure)
            elif isinstance(message, protocol.Seen):
                # The last of the answers that a conclusion waits for.
                if self._watchdog.answer(rank, message) and self._conclude_hang in self._deadlines:
                    self._after(0.0, self._conclude_hang)
            else:
                self._answers.setdefault(type(message), {})[rank] = file
                if file is not None:
                    self._files.append(file)
                self._changed.notify_all()
        return True

    def _report(
        self, rank: int, failure: RemoteFailure | BaseException, facts: RemoteFailure
    ) -> None:
        self._failures[rank] = failure
        self._failed_at[rank] = time.monotonic()
        if not facts.is_collective:
            self._conclude(self._error_of(rank))
        elif self._conclusion is None and self._look_for_the_cause not in self._deadlines:
            self._after(_CAUSE_SECONDS, self._look_for_the_cause)

    def _watch(self) -> None:
        """Look for ranks that wait in vain."""
        with self._changed:
            ended = self._ended()
            if self._conclusion is not None or len(ended) > len(self._workers):
                return
            # Once a rank has failed, others fail of it, and the reason is on its way.
            hung = None if self._failures else self._watchdog.tick(ended)
            if hung is not None:
                self._conclude(hung)
            else:
                self._after(self._watchdog.interval, self._watch)

    def _ended(self) -> set[int]:
        """The ranks whose function has come to its end."""
        ended = set(self._answers.get(protocol.Done, {}))
        return ended if self._rank_zero_busy or 0 in self._failures else {0, *ended}

    def _look_for_the_cause(self) -> None:
        """Ask all ranks where they are, as none has told of a cause."""
        with self._changed:
            if self._conclusion is not None:
                return
            over = {*self._failures, *self._ended()}
            self._missing = tuple(rank for rank in (0, *self._workers) if rank not in over)
            self._watchdog.ask_all()
            self._after(_STACK_SECONDS, self._conclude_hang)

    def _conclude_hang(self) -> None:
        with self._changed:
            facts = {rank: _facts(failure) for rank, failure in sorted(self._failures.items())}
            error = next((self._error_of(rank) for rank in facts), None)
            tracebacks = {rank: failure.traceback for rank, failure in facts.items()}
            situation = self._watchdog.situation(self._ended(), tracebacks)
            hung = situation.mismatch()
            if hung is None:
                if error is not None and not any(each.is_timeout for each in facts.values()):
                    self._conclude(error)  # a connection broke, and everybody is still there
                    return
                hung = situation.given_up(self._missing or self._late(facts), self._timeout)
            hung.__cause__ = error
            self._conclude(hung)

    def _late(self, facts: dict[int, RemoteFailure]) -> tuple[int, ...]:
        """The ranks that came when others had given up, and found the connections closed."""
        timed_out = [self._failed_at[rank] for rank, failure in facts.items() if failure.is_timeout]
        gave_up = min(timed_out, default=0.0)
        return tuple(
            rank
            for rank, failure in facts.items()
            if not failure.is_timeout and self._failed_at[rank] > gave_up + _AT_ONCE_SECONDS
        )

    def _conclude(self, error: BaseException) -> None:
        if self._conclusion is not None:
            return
        self._conclusion = error
        self._end_workers()
        self._changed.notify_all()
        self._after(_NOTICE_SECONDS, self._interrupt_rank_zero)

    def _interrupt_rank_zero(self) -> None:
        with self._changed:
            if self._rank_zero_busy:
                self._interrupter.interrupt()
                self._after(_CLEANUP_SECONDS, self._interrupt_rank_zero)

    def _on_signals(self) -> bool:
        for signum in self._interrupter.wakeup.recv(64):
            if signum in (signal.SIGINT, signal.SIGTERM):
                patient = signal.getsignal(signum) is not signal.default_int_handler
                self._interrupter.ping()
                self._after(_PATIENCE_SECONDS if patient else _CAUSE_SECONDS, self._free_rank_zero)
        return True

    def _free_rank_zero(self) -> None:
        """Stop the workers if rank 0 is to be interrupted but waits in native code."""
        with self._changed:
            if self._rank_zero_busy and not self._interrupter.is_responsive:
                self._rank_zero_freed = True
                self._end_workers()

    def _end_workers(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        self._unblock()

    def _error_of(self, rank: int) -> BaseException:
        failure = self._failures[rank]
        return failure.restore(rank) if isinstance(failure, RemoteFailure) else failure

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._deadlines[action] = time.monotonic() + seconds
        if threading.current_thread() is not self._thread:
            os.write(self._control_writer, _LOOK)

    def _seconds_to_deadline(self) -> float | None:
        with self._changed:
            if not self._deadlines:
                return None
            return max(0.0, min(self._deadlines.values()) - time.monotonic())

    def _meet_deadlines(self) -> None:
        now = time.monotonic()
        with self._changed:
            due = [action for action, when in self._deadlines.items() if when <= now]
            for action in due:
                del self._deadlines[action]
        for action in due:
            action()


def _facts(failure: RemoteFailure | BaseException) -> RemoteFailure:
    return failure if isinstance(failure, RemoteFailure) else RemoteFailure.of(failure)
