"""Ray actor that runs one rank, for one run after another."""

import dataclasses
import gc
import os
import pickle
import queue
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

import cloudpickle
import ray
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_mgpu.launch.errors import RemoteFailure
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.launch.rank import GroupGuard, Rendezvous
from lightning_mgpu.launch.rank_variables import of_rank
from lightning_mgpu.launch.torch_state import release_accelerator_memory
from lightning_mgpu.ray import demand
from lightning_mgpu.ray.object_store import PackedObject, unpack
from lightning_mgpu.ray.ranks import RankAssignment, machine

# What a worker keeps of its own environment, whatever the driver's says.
_OWN = ("RAY_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_", "PYTHON")
# What goes to other machines as well: Lightning's seeds.
_EVERYWHERE = ("PL_",)
# How many messages may wait for the driver before the worker waits for it.
_MESSAGES = 2


@dataclass(frozen=True)
class RunSpec:
    """Data that a worker needs before it unpickles the user's objects."""

    place: RankAssignment
    state: ProcessState
    machine: str


class SavedCheckpoint(Protocol):
    """A checkpoint sent to workers that resume from it."""

    def copy_to(self, file: IO[bytes]) -> bool:
        """Write the checkpoint to a file; return whether there is one."""


class TrainWorker:
    """Worker actor, which keeps nothing between runs but imported modules.

    Args:
        hook: A pickled function to call before all else.
    """

    def __init__(self, hook: bytes | None) -> None:
        self._messages: queue.Queue[bytes | None] = queue.Queue(_MESSAGES)
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._rendezvous: Rendezvous | None = None
        self._calls = 0
        before = dict(os.environ)
        if hook is not None:
            cloudpickle.loads(hook)()
        self._environment = dict(os.environ)
        self._own = {name for name, value in os.environ.items() if before.get(name) != value}
        self._own |= set_by_ray()
        # Never garbage: the modules imported so far, Lightning (by `place`) and torch among them.
        # Keep every later collection off them.
        gc.freeze()

    def node(self) -> tuple[str, str]:
        """Id and address of the node."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function between runs."""
        return function()

    def listen(self, host: str) -> int:
        """Open the store through which the ranks of the next run meet; return its port."""
        self._rendezvous = Rendezvous(host)
        return self._rendezvous.port

    def run(
        self, job: RunSpec, packed: PackedObject, resume: SavedCheckpoint | None
    ) -> tuple[list[PackedObject] | None, RemoteFailure | None]:
        """Unpickle a function and call it: the packed objects it returns, or its error.

        Args:
            job: All else that belongs to the run.
            packed: The function, of the place and of a path.
            resume: The checkpoint that will lie at the path.
        """
        global _current
        self._calls += 1
        try:
            with GroupGuard(), _as_file(resume) as path:
                _current = self
                rank_zero_only.rank = job.place.rank  # type: ignore[attr-defined]
                adopt(job.state, job.machine, self._environment, self._own)
                place = job.place
                os.environ.update(
                    of_rank(place, place.local_rank, place.local_world_size, place.node_rank)
                )
                return unpack(packed)(job.place, path), None
        except BaseException as error:
            return None, RemoteFailure.of(error)
        finally:
            _current = None
            self._rendezvous = None
            if job.place.rank == 0:  # to whom alone the driver listens
                self._messages.put(None)
            sys.stdout.flush()
            sys.stderr.flush()
            gc.collect()
            release_accelerator_memory()

    @ray.method(concurrency_group="messages")
    def next_message(self) -> bytes | None:
        """Wait for a request to the driver; `None` when the run is over."""
        return self._messages.get()

    @ray.method(concurrency_group="messages")
    def take_answer(self, answer: bytes) -> None:
        """Receive the driver's answer to a request."""
        self._answers.put(answer)

    @ray.method(concurrency_group="demand")
    def watch_demand(self, calls: int, held: list[str], seconds: float) -> bool:
        """Wait between runs until somebody else needs the workers' resources.

        Args:
            calls: The number of runs so far; with the next one, waiting is over.
            held: Names of the resources.
            seconds: How long to wait.

        Returns:
            Whether Ray says what others want.
        """
        return demand.wait(held, seconds, lambda: self._calls != calls)

    def post(self, message: bytes) -> None:
        """Leave a request for the driver."""
        self._messages.put(message)

    def wait_for_answer(self) -> bytes:
        """Wait for the driver's answer to the last request."""
        return self._answers.get()


_current: TrainWorker | None = None


def is_worker() -> bool:
    """Return whether this process is running a rank."""
    return _current is not None


def call_on_driver(function: Callable[..., Any], *args: Any) -> None:
    """Have the driver call a function, in the order of the calls. Does not wait for it."""
    assert _current is not None, "no run"
    _current.post(cloudpickle.dumps((function, args, False)))


def ask_driver(function: Callable[..., Any], *args: Any) -> Any:
    """Have the driver call a function, after those of the calls before, and wait for its result.

    For rank 0 alone: the driver listens to nobody else.
    """
    assert _current is not None, "no run"
    _current.post(cloudpickle.dumps((function, args, True)))
    return pickle.loads(_current.wait_for_answer())


@contextmanager
def _as_file(saved: SavedCheckpoint | None) -> Iterator[str | None]:
    """Path of the checkpoint as a file during the block; `None` without a checkpoint."""
    # In memory: nothing stays behind when the worker is killed.
    with os.fdopen(os.memfd_create("lightning_mgpu"), "wb") as file:
        there = saved is not None and saved.copy_to(file)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}" if there else None


def set_by_ray() -> set[str]:
    """Environment variables that a runtime environment has set for this worker."""
    return set(ray.get_runtime_context().runtime_env.get("env_vars") or {})


def adopt(
    state: ProcessState, driver: str, environment: Mapping[str, str], own: Collection[str]
) -> None:
    """Apply the driver's state as far as it is valid on this machine.

    Args:
        state: The driver's.
        driver: The driver's `machine`.
        environment: Variables of this worker, as they are between runs.
        own: Those that `init_hook` or a runtime environment has set for the workers, whatever the
            driver's say.
    """
    here = driver == machine()
    given = {
        name: value
        for name, value in state.environment.items()
        if name not in own
        and ((here and not name.startswith(_OWN)) or name.startswith(_EVERYWHERE))
    }
    dataclasses.replace(
        state,
        environment={**environment, **given},
        directory=state.directory if here else os.getcwd(),
        path=[*state.path, *(entry for entry in sys.path if entry not in state.path)]
        if here
        else list(sys.path),
    ).apply()
