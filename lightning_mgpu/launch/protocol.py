"""Messages between the caller and a worker.

One launch, from top to bottom::

    caller, rank 0                                   worker, rank k
         | --- Run, with the payload's file -----------> |  takes over the process state
         | --- Buffers: what is not in the file -------> |  unpickles the payload
         | <-- Ready ----------------------------------- |
    all are ready                                        |
         | --- Go -------------------------------------> |
    runs its function <==== collectives of torch ====> runs its function
         | <-- Done, with the result's file ------------ |
    all are done, so nobody still needs a peer           |
         | --- Release --------------------------------> |  leaves the process group, frees memory
         | <-- Idle ------------------------------------ |  awaited before the next Run
         v                                               v  waits for it

A worker whose part fails sends `Failed` in place of `Ready` or `Done`, and does not leave the group
by itself, since others may be talking to it: the caller kills all workers. `Look` may be sent at
any time, and is answered by `Seen` from a thread that is never busy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mgpu.launch.errors import RemoteFailure
from lightning_mgpu.launch.position import Position
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.launch.rank import Rank


@dataclass(frozen=True)
class Run:
    rank: Rank
    state: ProcessState
    prepare: Callable[[Rank], None] | None
    normal_exit: tuple[type[BaseException], ...]
    locations: Mapping[str, str]


@dataclass(frozen=True)
class Buffers:
    buffers: Sequence[Any]


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Go:
    pass


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Failed:
    failure: RemoteFailure


@dataclass(frozen=True)
class Release:
    pass


@dataclass(frozen=True)
class Idle:
    pass


@dataclass(frozen=True)
class Look:
    launch: int
    detailed: bool


@dataclass(frozen=True)
class Seen:
    launch: int
    position: Position
