"""Errors of a launch, and their transfer from a worker to the caller."""

import pickle
import signal
import sys
import traceback
from dataclasses import dataclass

import cloudpickle

from lightning_mgpu._compat.torch_messages import COLLECTIVE_FAILED, COLLECTIVE_TIMED_OUT


class LaunchError(RuntimeError):
    """A launch was refused or could not start."""


class UnpicklableError(LaunchError):
    """An object for the workers cannot be pickled; the message names where it is stored."""


class WorkerDiedError(RuntimeError):
    """A worker process ended during a launch without reporting an error.

    Attributes:
        rank: The rank that was lost.
        exit_code: As in `subprocess.Popen.returncode`: negative for a signal.
        details: Its Python stacks, and where others waited for it; empty if that is not known.
    """

    def __init__(self, rank: int, exit_code: int | None, details: str = "") -> None:
        self.rank = rank
        self.exit_code = exit_code
        self.details = details
        super().__init__(f"Rank {rank} died: {_describe_exit(exit_code)}\n{details}".rstrip())

    def __reduce__(self) -> tuple[type["WorkerDiedError"], tuple[int, int | None, str]]:
        return type(self), (self.rank, self.exit_code, self.details)


class RankHungError(TimeoutError):
    """Some ranks waited for others for too long, or for what cannot come.

    The message says where each rank is, and shows their stacks.

    Attributes:
        ranks: The ranks that did not arrive; empty if all waited for each other.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        self.ranks = ranks
        super().__init__(message)

    def __reduce__(self) -> tuple[type["RankHungError"], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


class RemoteTraceback(Exception):
    """Traceback of an error from another rank, as text; set as the error's cause."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""' if self.args else ""


@dataclass(frozen=True)
class RemoteFailure:
    """Picklable form of an exception, sent from a worker to the caller.

    Attributes:
        pickled: The exception, or `None` if it does not survive pickling.
        summary: Type and message, for the case that `pickled` is of no use.
        traceback: The formatted traceback of the rank that raised.
        is_collective: It reports that another rank went missing, so it is hardly the first cause.
        is_timeout: It reports that a collective ran out of time.
    """

    pickled: bytes | None
    summary: str
    traceback: str
    is_collective: bool
    is_timeout: bool

    @classmethod
    def of(cls, error: BaseException) -> "RemoteFailure":
        """Pack an exception; never raises."""
        return cls(
            pickled=_dump_or_none(error),
            summary="".join(traceback.format_exception_only(error)).strip(),
            traceback="".join(traceback.format_exception(error)),
            is_collective=is_collective_error(error),
            is_timeout=is_timeout_error(error),
        )

    def restore(self, rank: int) -> BaseException:
        """Unpack the exception, with the traceback of `rank` as its cause."""
        error: BaseException | None = None
        if self.pickled is not None:
            try:
                error = pickle.loads(self.pickled)
            except Exception:  # its module may exist on the worker only
                error = None
        if not isinstance(error, BaseException) or isinstance(error, (SystemExit, GeneratorExit)):
            # A `SystemExit` would end the caller's program in silence.
            error = RuntimeError(f"Rank {rank} raised {self.summary}")
        error.__cause__ = RemoteTraceback(f"On rank {rank}:\n{self.traceback}")
        return error


def is_collective_error(error: BaseException) -> bool:
    """Return whether `error` reports a lost or silent peer rather than a fault of its own rank."""
    distributed = sys.modules.get("torch.distributed")  # without it there are no collectives
    if distributed is not None and isinstance(error, distributed.DistError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and any(part in words for part in COLLECTIVE_FAILED)


def is_timeout_error(error: BaseException) -> bool:
    """Return whether `error` is the timeout of a collective."""
    words = str(error).lower()
    return is_collective_error(error) and any(part in words for part in COLLECTIVE_TIMED_OUT)


def _dump_or_none(error: BaseException) -> bytes | None:
    try:
        data = cloudpickle.dumps(error)
        # Exceptions with an `__init__` of their own often pickle and then fail to unpickle.
        pickle.loads(data)
    except Exception:
        return None
    return bytes(data)


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "it closed its connection"
    if exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"its process was killed by {name}{_HINTS.get(name, '')}"


_HINTS = {
    "SIGKILL": ", as the kernel does when memory runs out",
    "SIGABRT": ", as Gloo does it where ranks run different collectives",
}
