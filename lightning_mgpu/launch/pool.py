"""Pool of workers that outlive a launch, and the launch itself."""

import atexit
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_mgpu._compat.namespace import known_name
from lightning_mgpu.launch import payload, protocol
from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.launch.handle import Deliveries, WorkerHandle
from lightning_mgpu.launch.interrupt import Interrupter
from lightning_mgpu.launch.last_words import stacks_on_crash
from lightning_mgpu.launch.monitor import LaunchMonitor
from lightning_mgpu.launch.process_state import (
    ProcessState,
    TakeState,
    frozen_environment,
    threads_per_rank,
)
from lightning_mgpu.launch.rank import GroupGuard, Rank, Rendezvous, abort_group, leave_group
from lightning_mgpu.launch.rank_variables import RANK_VARIABLES, shown
from lightning_mgpu.launch.worker import is_worker

log = logging.getLogger(__name__)

# Importing torch from a cold, busy disk can take minutes.
_START_SECONDS = 600.0
_CLEANUP_SECONDS = 60.0


class WorkerPool:
    """Worker processes, started when first needed and kept for later launches.

    One launch at a time: the default process group is one per process. A failed launch kills the
    workers; the next one starts new ones. After a successful one they clean up while the caller
    goes on, unless an accelerator is in use: its memory is free when `launch` returns.
    """

    def __init__(self) -> None:
        self._workers: list[WorkerHandle] = []
        self._tidying: list[WorkerHandle] = []  # who has yet to say that it is idle
        self._launching = threading.Lock()
        self._owner = os.getpid()
        self._started_under: _FixedState | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers, in the order of their ranks."""
        return [worker.pid for worker in self._workers if worker.is_alive()]

    def launch(
        self,
        local: Callable[[Rank], Any],
        remote: payload.Payload | None,
        *,
        world_size: int,
        timeout: timedelta,
        hang_timeout: float | None = None,
        prepare: Callable[[Rank], None] | None = None,
        normal_exit: tuple[type[BaseException], ...] = (),
        locations: Callable[[int], Mapping[str, str]] = lambda _: {},
        libraries: Iterable[TakeState] = (),
    ) -> list[Any]:
        """Run a function on every rank and wait for all of them.

        Args:
            local: Rank 0's function, called in this thread.
            remote: The pickled function of the other ranks, closed as soon as they have it;
                `None` if there are none.
            world_size: Number of ranks, the calling process included.
            timeout: How long ranks wait for each other; a rank that is later counts as hung.
            hang_timeout: Seconds that a rank may keep another waiting in a collective; default: a
                little less than `timeout`.
            prepare: Called on each worker before `remote` is unpickled; picklable by reference.
            normal_exit: Exceptions that end a rank's function without being a failure.
            locations: For a rank, where tensors go that are on an accelerator here, as
                ``{"cuda:0": "cuda:1"}``; default: to the same.
            libraries: Whose state the workers take over, beside that of torch.

        Returns:
            The ranks' results, by rank. Those of the workers have their tensors on the CPU.

        Raises:
            LaunchError: Refused: inside a worker, beside another launch or beside a process group
                that somebody else has initialised.
            WorkerDiedError: A worker's process ended.
            RankHungError: A rank kept others waiting for too long, or ranks wait for what cannot
                come.
            BaseException: What any rank's function raised; one raised on a worker has that
                rank's traceback as its cause.
        """
        with self._exclusive(), ExitStack() as stack:
            threads = threads_per_rank(world_size)
            state = ProcessState.capture(threads, for_ranks=True, libraries=libraries)
            workers = dict(enumerate(self._take(world_size - 1), start=1))
            rendezvous = stack.enter_context(Rendezvous())
            stack.enter_context(GroupGuard())
            stack.enter_context(_intra_op_threads(threads))
            stack.enter_context(stacks_on_crash())
            # Like the group below what kills the workers, which ends every delivery.
            deliveries = stack.enter_context(Deliveries())
            # Below the group on the stack, so that a failure kills the workers before the group
            # is destroyed: only then can nothing block.
            stack.enter_context(self._closed_on_failure(normal_exit))
            interrupter = stack.enter_context(Interrupter())

            def unblock() -> None:
                rendezvous.close()
                # In a thread of its own, since it may itself take its time.
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    threading.Thread(target=abort_group, daemon=True).start()

            seconds = timeout.total_seconds()
            watch = stack.enter_context(
                LaunchMonitor(workers, interrupter, seconds, unblock, hang_timeout)
            )

            def run(rank: int) -> protocol.Run:
                return protocol.Run(ranks[rank], state, prepare, normal_exit, locations(rank))

            ranks = [Rank(rank, world_size, rendezvous.port) for rank in range(world_size)]
            if remote is not None:
                for rank, worker in workers.items():
                    worker.send(run(rank), remote.file)
                    # To all at the same time, and a worker that takes nothing stops nobody.
                    deliveries.start(worker, protocol.Buffers(remote.buffers))
            watch.collect(protocol.Ready, _START_SECONDS)
            if remote is not None:
                remote.close()
            for worker in workers.values():
                worker.send(protocol.Go())

            result, ending = None, None
            try:
                with shown(ranks[0]):
                    result = watch.rank_zero(local, ranks[0])
            except normal_exit as error:
                ending = error
            files = watch.collect(protocol.Done, seconds)
            for worker in workers.values():
                worker.send(protocol.Release())
            # All at the same time: to destroy an NCCL group may take every rank.
            leave_group(wait=False)
            loaded = (payload.load(os.dup(file)) for _, file in sorted(files.items()))
            results = [result, *loaded]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                watch.wait_for(protocol.Idle, _CLEANUP_SECONDS)
            watch.stop()
            idle = watch.answered(protocol.Idle)
            self._tidying = [worker for rank, worker in workers.items() if rank not in idle]
            if ending is not None:
                raise ending
            return results

    def close(self) -> None:
        """Stop every worker. The pool can be used again."""
        self._settle()
        workers, self._workers = self._workers, []
        if os.getpid() == self._owner:  # a forked child must leave its parent's workers alone
            for worker in workers:
                worker.close()

    def _take(self, count: int) -> list[WorkerHandle]:
        """Take `count` workers that suit this process; start those that are missing."""
        self._settle()
        conditions = _FixedState()
        fit = self._started_under is not None and self._started_under.still_hold(conditions)
        if not fit or len(self.pids) < len(self._workers) or os.getpid() != self._owner:
            self.close()
            self._started_under, self._owner = conditions, os.getpid()
        elif self._started_under is not None:
            self._started_under.add(conditions)
        environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        while len(self._workers) < count:
            self._workers.append(WorkerHandle(environment, sys.path, known_name()))
        return self._workers[:count]

    def _settle(self) -> None:
        """Wait until the workers have cleaned up after a launch; kill those that cannot.

        What they do then, such as to finish a file that became garbage, must not be cut off.
        """
        tidying, self._tidying = self._tidying, []
        if os.getpid() != self._owner:
            return
        deadline = time.monotonic() + _CLEANUP_SECONDS
        try:
            if all(worker.comes_to_rest(deadline) for worker in tidying):
                return
            log.warning(
                "The workers did not finish cleaning up in time; the next launch starts new ones."
            )
        except BaseException:
            self.close()
            raise
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if is_worker():
            raise LaunchError(
                "This process is itself a worker of a launch, and a worker cannot launch others."
                " Create the inner trainer with `devices=1` and `strategy='auto'`, or run it after"
                " the outer one."
            )
        if not self._launching.acquire(blocking=False):
            raise LaunchError(
                "Another launch is running in this process, and torch has one default process"
                " group for all threads. Run the trainers one after another or in processes of"
                " their own."
            )
        try:
            if dist.is_initialized():
                raise LaunchError(
                    "A process group has been initialised already, by other code. Call"
                    " `torch.distributed.destroy_process_group()` first, or start every rank"
                    " from outside with `torchrun`."
                )
            yield
        finally:
            self._launching.release()

    @contextmanager
    def _closed_on_failure(self, normal_exit: tuple[type[BaseException], ...]) -> Iterator[None]:
        try:
            yield
        except normal_exit:
            raise
        except BaseException:
            self.close()
            abort_group()
            raise


class _FixedState:
    """State of this process that a running worker cannot adopt later."""

    def __init__(self) -> None:
        self._environment = frozen_environment()
        self._namespace = known_name()
        # `importlib.reload` gives a module a new spec; a worker would still run the old code.
        self._specs = {
            name: spec
            for name, module in list(sys.modules.items())
            if (spec := getattr(module, "__spec__", None)) is not None
            and not str(getattr(spec, "origin", "")).startswith((sys.prefix, sys.base_prefix))
        }

    def still_hold(self, now: "_FixedState") -> bool:
        """Return whether a process started under these conditions can serve under `now`."""
        return (
            self._environment == now._environment
            and self._namespace in (None, now._namespace)
            and all(now._specs.get(name, spec) is spec for name, spec in self._specs.items())
        )

    def add(self, now: "_FixedState") -> None:
        """Add the modules imported since, which the next launch may load in the workers."""
        self._specs = now._specs | self._specs


@contextmanager
def _intra_op_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def default_pool() -> WorkerPool:
    """Pool shared by all strategies of this process; its workers end with the process."""
    pool = WorkerPool()
    atexit.register(pool.close)
    return pool
