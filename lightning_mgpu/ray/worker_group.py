"""Warm workers: a group of actors that outlives a call, and the groups that this driver keeps."""

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
from lightning_mgpu.ray.idle import Rest
from lightning_mgpu.ray.monitor import Watch
from lightning_mgpu.ray.object_store import Parcel
from lightning_mgpu.ray.ranks import Place, machine, places
from lightning_mgpu.ray.tune_placement import TrialBundles
from lightning_mgpu.ray.worker import Job, Saved, TrainWorker

# How long idle workers may take to show that they are alive.
_ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class Group:
    """What workers are asked for; a session serves every call that asks for the same.

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
        """What to reserve for all workers, as many as are enough."""
        return [dict(self.resources)] * self.most

    @property
    def held(self) -> list[str]:
        """Names of the resources that the workers keep from others."""
        names = [name for name, _ in self.resources]
        # A trial's bundles are for the trial's own tasks and actors, under names of their own.
        return names if self.trial is None else [of_group(n, self.trial.group) for n in names]

    def fits(self, count: int) -> bool:
        """Whether the cluster seems to have so many workers' resources free."""
        return cluster.fits([dict(self.resources)] * count, free=True)


class Session:
    """Workers that have been started, and what they hold of the cluster."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.busy = True
        self._reservation: PlacementGroup | None = None
        self._workers: list[Any] = []
        self._idle: Rest | None = None
        self._calls = 0
        self._connection = connection.connection()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def run(self, parcel: Parcel, state: ProcessState, resume: Saved | None) -> list[list[Parcel]]:
        """Run a pickled function on every worker and wait for all of them.

        Args:
            parcel: A function of the `Place`, which returns parcels.
            state: The driver's state, for the workers to take over.
            resume: A checkpoint for the function to go on from.

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
        sent = ray.put(parcel)
        checkpoint = ray.put(resume)
        self._calls += 1
        runs = {}
        for worker, place in zip(self._workers, self._places, strict=True):
            job = Job(replace(place, host=host, port=port), state, machine())
            runs[worker.run.remote(job, sent, checkpoint)] = place.rank
        return Watch(runs, self._workers[0]).outcomes()

    def call(self, function: Callable[[], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Call a function of ours on some workers, or on all; what it returns."""
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
        """Wait for the next call, at most `seconds`, and until others wait for the resources."""
        self.busy = False
        first, end = self._workers[0], partial(close_if_idle, self)
        self._idle = Rest(first, self._calls, self.group.held, seconds, end)

    def wake(self) -> None:
        """The next call has come."""
        if self._idle is not None:
            self._idle.stop()
        self.busy, self._idle = True, None

    def is_stale(self) -> bool:
        """Whether Ray has been shut down since the workers were started, which ended them."""
        return self._connection != connection.connection()

    def is_alive(self) -> bool:
        """Whether every worker still answers."""
        try:
            ray.get([worker.node.remote() for worker in self._workers], timeout=_ALIVE_SECONDS)
        except RayError:
            return False
        return True

    def close(self) -> None:
        """End the workers and give back what they hold. May be called twice."""
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
        if reservation is not None and self.group.trial is None:
            with suppress(RayError):
                remove_placement_group(reservation)

    def _start(self) -> None:
        group = self.group
        resources = dict(group.resources)
        if group.trial is None:
            self._reservation, first = (
                cluster.reserve(resources, group.least, group.most, group.placement),
                0,
            )
            size = self._reservation.bundle_count
        else:
            self._reservation, first = get_current_placement_group(), group.trial.first
            size = group.most
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
            worker = actor.options(**options, scheduling_strategy=strategy).remote(group.hook)
            self._workers.append(worker)
        nodes = ray.get([worker.node.remote() for worker in self._workers])
        # Neighbours get neighbouring ranks.
        order = sorted(range(size), key=lambda i: [n for n, _ in nodes].index(nodes[i][0]))
        self._workers = [self._workers[i] for i in order]
        self._places: list[Place] = places([nodes[i][0] for i in order])
        self._address: str = nodes[order[0]][1]


_sessions: list[Session] = []
_changing = threading.RLock()
_idle_seconds = 300.0


def take(group: Group) -> Session:
    """A session that nobody uses: a warm one, or else a new one."""
    with _changing:
        for session in list(_sessions):
            if session.is_stale():
                discard(session)
            elif session.group == group and not session.busy:
                session.wake()
                # More of them, if that is welcome by now?
                enough = session.size >= group.most or not group.fits(1)
                if enough and session.is_alive():
                    return session
                discard(session)
        if group.trial is None and not group.fits(group.most):
            close()
    session = Session(group)
    with _changing:
        _sessions.append(session)
    return session


def discard(session: Session) -> None:
    """End a session."""
    with _changing:
        if session in _sessions:
            _sessions.remove(session)
    session.close()


def close_if_idle(session: Session) -> None:
    """End a session unless a call has come in the meantime."""
    with _changing:
        if not session.busy:
            discard(session)


def keep_warm(seconds: float) -> None:
    """Set how long workers wait for the next call before they end.

    Args:
        seconds: From now on; 0 ends them after each call.
    """
    global _idle_seconds
    if seconds < 0:
        raise ValueError(f"`keep_warm({seconds})`: expected 0 seconds or more.")
    _idle_seconds = seconds


def idle_seconds() -> float:
    """How long workers wait for the next call before they end."""
    return _idle_seconds


def close() -> None:
    """End the workers that are kept for later calls, and free what they hold of the cluster."""
    with _changing:
        for session in list(_sessions):
            close_if_idle(session)
