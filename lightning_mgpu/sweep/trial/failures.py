"""Reasons for failed trials, and retries."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from typing_extensions import override

from lightning_mgpu._compat.lightning_messages import says_out_of_memory
from lightning_mgpu._compat.ray import memory_of
from lightning_mgpu._compat.ray_tune import ActorLostError, make
from lightning_mgpu.errors import NonFiniteError, one_line
from lightning_mgpu.sweep.trial.crashes import crash_in


class TrialFailedError(RuntimeError):
    """A trial failed; the message says why, as its error may be unknown to the reader."""


class TrialOutOfMemoryError(TrialFailedError):
    """A trial failed for lack of memory; a smaller one may not."""


class MetricMissingError(TrialFailedError):
    """A trial ended, and has never logged the metric that the user named."""


_OUT_OF_MEMORY = (MemoryError, OutOfMemoryError, TrialOutOfMemoryError)


@contextlib.contextmanager
def failures_in_words() -> Iterator[None]:
    """Convert errors of a trial into ones that every process can unpickle."""
    try:
        yield
    except MetricMissingError:
        traceback.print_exc()
        raise  # these are words already
    except Exception as error:
        traceback.print_exc()
        said = error.words if isinstance(error, NonFiniteError) else one_line(error)
        words = f"{type(error).__name__}: {said}"
        if is_out_of_memory(error):
            raise TrialOutOfMemoryError(f"out of memory, {words}") from None
        raise TrialFailedError(words) from None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is about a device's or the machine's memory."""
    while error is not None:
        if isinstance(getattr(error, "cause", error), _OUT_OF_MEMORY):  # Ray's keep the first one
            return True
        if "torch" in sys.modules and _is_of_torch(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def lacks_metric(error: BaseException | None) -> bool:
    """Return whether a trial failed since it has never logged the metric."""
    return isinstance(getattr(error, "cause", error), MetricMissingError)


def _is_of_torch(error: BaseException) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error.args[0] if error.args else None, str) and says_out_of_memory(error)


def reason(error: BaseException | None) -> str:
    """Reason of a trial's failure in one line."""
    lost = error.cause if isinstance(error, ActorLostError) else error
    if isinstance(lost, OutOfMemoryError):
        memory = memory_of(lost)
        used = "" if memory is None else f" ({memory})"
        return f"out of memory on the machine{used}: Ray killed its process"
    if isinstance(error, ActorLostError):
        return f"its process was lost ({type(lost).__name__}: {one_line(error, 200)})"
    if isinstance(error, RayActorError):
        return "its process died, perhaps killed for lack of memory"
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__


def explain(trial: "SweepTrial", log: Path) -> str:
    """Reason of a trial's latest failure; its log tells a crash, of which Ray knows nothing."""
    crash = crash_in(log) if trial.has_died else None
    return trial.failure if crash is None else f"its process died: {crash} (see {log.name})"


class SweepTrial(Trial):
    """Ray's trial with the reason of its failure.

    Attributes:
        failure: The latest reason.
        has_died: Whether its process has.
        lacks_metric: Whether it has never logged the metric. It is not tried again then.
    """

    failure = ""
    has_died = False
    lacks_metric = False

    @classmethod
    def take_over(cls, trial: Trial) -> None:
        """Convert a trial, which Ray creates or restores, into one of ours."""
        make(trial, cls)

    @classmethod
    def smaller(cls, config: dict[str, Any]) -> dict[str, Any] | None:
        """Values for the retry of a trial that ran out of memory; `None` for no retry."""
        return None

    @override
    def handle_error(self, exc: Any = None) -> None:
        super().handle_error(exc)
        self.failure = reason(exc)
        self.has_died = isinstance(exc, RayActorError) and not isinstance(exc, ActorLostError)
        self.lacks_metric = lacks_metric(exc)
        if self.lacks_metric:
            self.max_failures = 0
        if not is_out_of_memory(exc):
            return
        config = self.smaller(self.config)
        if config is not None:
            self.set_config(config)  # type: ignore[no-untyped-call]
            self.max_failures += self.max_failures >= 0  # this one does not count


def retrying(smaller: Callable[[dict[str, Any]], dict[str, Any] | None]) -> type[SweepTrial]:
    """Trial class that retries with `smaller(config)` when out of memory."""
    return type("SmallerTrial", (SweepTrial,), {"smaller": staticmethod(smaller)})
