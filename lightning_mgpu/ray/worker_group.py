"""Groups of warm worker actors that outlive a call."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightning_mgpu._compat.ray import of_group
from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.ray import cluster, connection
from lightning_mgpu.ray.idle import IdleTimer
from lightning_mgpu.ray.monitor import RunMonitor
from lightning_mgpu.ray.object_store import PackedObject
from lightning_mgpu.ray.ranks import RankAssignment, machine, places
from lightning_mgpu.ray.tune_placement import TrialBundles
from lightning_mgpu.ray.worker import RunSpec, SavedCheckpoint, TrainWorker

# How long idle workers may take to show that they are alive.
_ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerRequest:
    """Request for workers; a worker group serves every call with the same request.

    Attributes:
        least: Number of workers to wait for.
        most: Number of workers that are enough, where the cluster can give more than `least`.
        resources: Of each worker, as sorted pairs.
        hook: Pickled function for each worker to call before all else.
        placement: Ray's strategy for their nodes.
        trial: What the Tune trial that this process runs has reserved for them.
    """

    least: int
    most: int
    resources: tuple[tuple[str, float], ...]
    hook: bytes | None
    placement: str = "PACK"
    trial: TrialBundles | None = None

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources to reserve, one bundle for each of the most workers."""
        return [dict(self.resources)] * self.most

    @property
    def held(self) -> list[str]:
        """Names of the resources that the workers occupy."""
        names = [name for name, _ in self.resources]
        # A trial's bundles are for the trial's own tasks and actors, under names of their own.
        return names if self.trial is None else [of_group(n, self.trial.group) for n in names]

    def fits(self, count: int) -> bool:
        """Return whether the cluster seems to have resources for `count` workers free."""
        return cluster.fits([dict(self.resources)] * count, free=True)


class WorkerGroup:
    """Running workers and the resources they hold."""

    def __init__(self, request: WorkerRequest) -> None:
        self.request = request
        self.busy = True
        self._reservation: PlacementGroup | None = None
        self._workers: list[Any] = []
        self._idle: IdleTimer | None = None
        self._calls = 0
        self._connection = connection.connection()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(
        self, packed: PackedObject, state: ProcessState, resume: SavedCheckpoint | None
    ) -> list[list[PackedObject]]:
        """Run a pickled function on every worker and wait for all of them.

        Args:
            packed: A function of the `RankAssignment`, which returns packed objects.
            state: The driver's state, for the workers to take over.
            resume: A checkpoint for the function to resume from.

        Returns:
            What the ranks return, by rank.

        Raises:
            WorkerDiedError: A worker's process ended.
            BaseException: What any rank's function raised, its cause that rank's traceback.
        """
        single = self._places[0].num_nodes == 1
        host = "127.0.0.1" if single else self._address
        try:
            port = ray.get(self._workers[0].listen.remote(host))
        except RayError as error:
            raise WorkerDiedError(0, None) from error
        sent = ray.put(packed)
        checkpoint = ray.put(resume)
        self._calls += 1
        runs = {}
        for worker, place in zip(self._workers, self._places, strict=True):
            job = RunSpec(replace(place, host=host, port=port), state, machine())
            runs[worker.run.remote(job, sent, checkpoint)] = place.rank
        return RunMonitor(runs, self._workers[0]).outcomes()

    def call(self, function: Callable[[], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Call a function on some or all workers between runs; return the results."""
        chosen = range(len(self._workers)) if ranks is None else ranks
        try:
            results: list[Any] = ray.get(
                [self._workers[rank].call.remote(function) for rank in chosen]
            )
        except RayActorError as error:
            raise WorkerDiedError(chosen[0], None) from error
        return results

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def rest(self, seconds: float) -> None:
        """Keep the workers for at most `seconds`, or until others wait for the resources."""
        self.busy = False
        first, end = self._workers[0], partial(close_if_idle, self)
        self._idle = IdleTimer(first, self._calls, self.request.held, seconds, end)

    def wake(self) -> None:
        """Stop the idle timer: the next call has come."""
        if self._idle is not None:
            self._idle.stop()
        self.busy, self._idle = True, None

    def is_stale(self) -> bool:
        """Return whether Ray has been shut down, which also ended the workers."""
        return self._connection != connection.connection()

    def is_alive(self) -> bool:
        """Return whether every worker still answers."""
        try:
            ray.get([worker.node.remote() for worker in self._workers], timeout=_ALIVE_SECONDS)
        except RayError:
            return False
        return True

    def close(self) -> None:
        """Stop the workers and free their resources. May be called twice."""
        self.busy = True  # nobody's any more
        if self._idle is not None:
            self._idle.stop()
        workers, self._workers = self._workers, []
        if self.is_stale():
            return
        for worker in workers:
            with suppress(RayError):
                ray.kill(worker)
        reservation, self._reservation = self._reservation, None
        if reservation is not None and self.request.trial is None:
            with suppress(RayError):
                remove_placement_group(reservation)

    def _start(self) -> None:
        request = self.request
        resources = dict(request.resources)
        if request.trial is None:
            self._reservation, first = (
                cluster.reserve(resources, request.least, request.most, request.placement),
                0,
            )
            size = self._reservation.bundle_count
        else:
            self._reservation, first = get_current_placement_group(), request.trial.first
            size = request.most
        assert self._reservation is not None
        options: dict[str, Any] = {
            "num_cpus": resources.pop("CPU", 0),
            "num_gpus": resources.pop("GPU", 0),
            "resources": resources,
        }
        # An option that Ray documents and does not declare.
        groups: Any = {"concurrency_groups": {"messages": 1, "demand": 1}}
        actor = ray.remote(**groups)(TrainWorker)
        for index in range(first, first + size):
            strategy = PlacementGroupSchedulingStrategy(self._reservation, index)
            worker = actor.options(**options, scheduling_strategy=strategy).remote(request.hook)
            self._workers.append(worker)
        nodes = ray.get([worker.node.remote() for worker in self._workers])
        # Neighbours get neighbouring ranks.
        order = sorted(range(size), key=lambda i: [n for n, _ in nodes].index(nodes[i][0]))
        self._workers = [self._workers[i] for i in order]
        self._places: list[RankAssignment] = places([nodes[i][0] for i in order])
        self._address: str = nodes[order[0]][1]


_groups: list[WorkerGroup] = []
_changing = threading.RLock()
_idle_seconds = 300.0


def take(request: WorkerRequest) -> WorkerGroup:
    """Take an unused group: a warm one, or else a new one."""
    with _changing:
        for group in list(_groups):
            if group.is_stale():
                discard(group)
            elif group.request == request and not group.busy:
                group.wake()
                # More of them, if that is welcome by now?
                enough = group.size >= request.most or not request.fits(1)
                if enough and group.is_alive():
                    return group
                discard(group)
        if request.trial is None and not request.fits(request.most):
            close()
    group = WorkerGroup(request)
    with _changing:
        _groups.append(group)
    return group


def discard(group: WorkerGroup) -> None:
    """Stop a group of workers."""
    with _changing:
        if group in _groups:
            _groups.remove(group)
    group.close()


def close_if_idle(group: WorkerGroup) -> None:
    """Stop a group unless a call has come in the meantime."""
    with _changing:
        if not group.busy:
            discard(group)


def keep_warm(seconds: float) -> None:
    """Set how many seconds workers wait for the next call before they stop.

    Args:
        seconds: From now on, at least 0, which ends them after each call; 300 at first.

    Raises:
        ValueError: The number is negative.
    """
    global _idle_seconds
    if seconds < 0:
        raise ValueError(f"`keep_warm({seconds})`: expected 0 seconds or more.")
    _idle_seconds = seconds


def idle_seconds() -> float:
    """Seconds that workers wait for the next call before they stop."""
    return _idle_seconds


def close() -> None:
    """Stop the workers that are kept for later calls, and free their resources."""
    with _changing:
        for group in list(_groups):
            close_if_idle(group)
