"""What the caller and a worker say to each other.

One launch, in order::

    caller -> worker   Run        the process state to take over; the payload comes as a file
    caller -> worker   Buffers    what is not in the file
    worker -> caller   Ready      the payload is unpickled
    caller -> worker   Go         every rank is ready
    worker -> caller   Done       the result comes as a file; or Failed, at any point
    caller -> worker   Release    every rank is done, so nobody still needs a peer
    worker -> caller   Idle       process group gone, memory freed; awaited before the next Run

`ShowStack` and `Stack` may come at any time in between.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mgpu.launch.errors import RemoteFailure
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
class ShowStack:
    pass


@dataclass(frozen=True)
class Stack:
    text: str
