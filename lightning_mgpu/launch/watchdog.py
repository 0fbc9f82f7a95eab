"""Notice ranks that wait for others in vain, without a word to ranks that get on."""

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_mgpu.launch import protocol
from lightning_mgpu.launch.diagnosis import Situation
from lightning_mgpu.launch.errors import RankHungError, WorkerDiedError
from lightning_mgpu.launch.handle import WorkerHandle
from lightning_mgpu.launch.position import Observer, Position

# An answer takes less than a millisecond; tens of them once for each collective that waits.
_TICK_SECONDS = 1.0
# NCCL ends the process when a collective gives up, and then nobody tells of the others.
_BEFORE_THE_TIMEOUT = 0.95
# When a whole job is suspended and goes on, one process is the first.
_STOPPED_SECONDS = 3.0
# Answers to what was asked in an earlier launch may still come.
_launches = itertools.count()


class Watchdog:
    """Compare where the ranks are, every second in which rank 0 runs no collective.

    A hang is seen where a rank waits in a collective to which another has not come. So a long
    validation or a checkpoint is none, whatever it takes, as long as nobody waits.

    Args:
        workers: The workers of this launch, by rank.
        observer: That of rank 0.
        timeout: The collectives' own timeout in seconds.
        hang_timeout: How long a rank may keep others waiting; default: a little less than that.
    """

    def __init__(
        self,
        workers: Mapping[int, WorkerHandle],
        observer: Observer,
        timeout: float,
        hang_timeout: float | None,
    ) -> None:
        self._workers = workers
        self._observer = observer
        self._option = "timeout" if hang_timeout is None else "hang_timeout_s"
        self._seconds = _BEFORE_THE_TIMEOUT * timeout if hang_timeout is None else hang_timeout
        self.interval = min(_TICK_SECONDS, self._seconds / 8)
        self._launch = next(_launches)
        self._details = False
        self._silent: set[int] = set()
        self._answers: dict[int, Position] = {}
        self._since: dict[tuple[Any, ...], float] = {}
        self._counts: tuple[Any, ...] = ()
        self._looked_at = time.monotonic()

    def tick(self, ended: Iterable[int]) -> RankHungError | None:
        """Look at what the ranks have answered since the last tick, and ask them again.

        Args:
            ended: Ranks whose function has ended.

        Returns:
            The error for a hang.
        """
        now = time.monotonic()
        if now - self._looked_at > 5 * self.interval + 1.0:
            self._since.clear()  # this process was stopped itself
        self._looked_at = now
        counts = self._observer.counts()
        if counts != self._counts:
            self._counts, self._details = counts, False
            self._since.clear()
            self._answers.clear()
            return None
        situation = self.situation(ended)
        self._note(situation, now)
        error = situation.certain() or situation.hung(self._seconds, self._option)
        if error is None:
            self._details = any(True for _ in situation.waits())
            self._ask([rank for rank in self._workers if rank not in self._silent])
        return error

    def ask_all(self) -> None:
        """Ask the workers for all details, whatever they were asked before."""
        self._details = True
        self._ask(self._workers)

    def answer(self, rank: int, seen: protocol.Seen) -> bool:
        """Take a worker's answer; return whether all workers have answered."""
        if seen.launch == self._launch:
            self._silent.discard(rank)
            self._answers[rank] = seen.position
        return self._answers.keys() == self._workers.keys()

    def situation(
        self, ended: Iterable[int], tracebacks: Mapping[int, str] | None = None
    ) -> Situation:
        """What is known of all ranks now.

        Args:
            ended: Ranks whose function has ended.
            tracebacks: Of ranks that have failed.
        """
        here = {0: self._observer.look(self._details)}
        return Situation(here | self._answers, frozenset(ended), tracebacks or {})

    def death_of(self, rank: int) -> WorkerDiedError:
        """The error for a worker that has closed its connection."""
        worker = self._workers[rank]
        exit_code, details = worker.exit_code(), worker.last_words()
        if details:  # a crash, perhaps since others run something else
            others = Situation({0: self._observer.look(detailed=True)}).told()
            details = f"{others}\nPython stacks of rank {rank} when it died:\n{details}"
        return WorkerDiedError(rank, exit_code, details)

    def _ask(self, ranks: Iterable[int]) -> None:
        self._answers.clear()
        for rank in ranks:
            # Nobody reads what is sent to one that is stopped, and a full socket would stop us.
            if not self._workers[rank].is_stopped():
                self._silent.add(rank)
                self._workers[rank].send(protocol.Look(self._launch, self._details))

    def _note(self, situation: Situation, now: float) -> None:
        """Add to a situation for how long it has been so."""
        known = situation.positions
        waits = [
            (wait.rank, wait.collective.group, wait.collective.number) for wait in situation.waits()
        ]
        stopped = [
            (rank, "stopped")
            for rank, worker in self._workers.items()
            if rank not in known and worker.is_stopped()
        ]
        # Who has not answered yet may still wait.
        kept = {
            key: since
            for key, since in self._since.items()
            if key in waits or key in stopped or (key[0] not in known and "stopped" not in key)
        }
        self._since = {key: now for key in (*waits, *stopped)} | kept
        situation.waited = {key[0]: now - self._since[key] for key in waits}
        situation.stopped = {
            key[0]: self._workers[key[0]].pid
            for key in stopped
            if now - self._since[key] >= min(_STOPPED_SECONDS, self._seconds / 2)
        }
