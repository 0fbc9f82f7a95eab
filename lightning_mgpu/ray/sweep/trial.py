"""One trial: one Hydra job, run by an actor that serves many of them."""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train._internal.session import get_session
from ray.tune import Checkpoint, PlacementGroupFactory
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.trainable.function_trainable import FunctionTrainable
from typing_extensions import override

from lightning_mgpu.launch.pickler import dumps
from lightning_mgpu.launch.state import ProcessState
from lightning_mgpu.ray.sweep import reporter
from lightning_mgpu.ray.sweep.failures import failures_in_words
from lightning_mgpu.ray.sweep.job import Job
from lightning_mgpu.ray.sweep.memory import compose
from lightning_mgpu.ray.sweep.output import output_to
from lightning_mgpu.ray.sweep.resources import request
from lightning_mgpu.ray.sweep.scrub import Scrubber, adopt
from lightning_mgpu.ray.sweep.space import Space

__all__: list[str] = []

log = logging.getLogger(__name__)

LOG_FILE = "trial.log"
# How long a trial that was stopped may take to end before its process is given up.
_END_SECONDS = 600


class MetricMissingError(RuntimeError):
    """A trial ended and has not said how good it is."""


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a sweep has in common.

    Attributes:
        objectives: Names of what is optimised.
        are_logged: Whether these are metrics that the job logs, or stand for what it returns.
    """

    job: Job
    space: Space
    sweep_dir: Path
    objectives: tuple[str, ...]
    are_logged: bool
    every_n_epochs: int
    saves: bool
    threads: int

    def dumps(self) -> bytes:
        """Pickled with the state of this process, which comes first: it says where modules lie."""
        state = ProcessState.capture(self.threads)
        return pickle.dumps((self.threads, state, dumps(self)))


class HydraTrial(FunctionTrainable):
    """Runs a trial on a thread of its actor, and the next one when it is over.

    Attributes:
        payload: The pickled `TrialPlan` of the sweep.
    """

    payload = b""

    @classmethod
    def of(cls, plan: TrialPlan) -> type["HydraTrial"]:
        """The trainable of a sweep."""
        return type("HydraJob", (cls,), {"payload": plan.dumps(), "_name": "hydra"})

    @classmethod
    @override
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory | None:
        return request(config)

    @override
    def setup(self, config: dict[str, Any]) -> None:
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_END_SECONDS)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        threads, state, plan = pickle.loads(self.payload)
        state = adopt(state, threads)
        state.apply()
        self._plan: TrialPlan = pickle.loads(plan)
        self._scrubber = Scrubber(state)
        super().setup(config)  # type: ignore[no-untyped-call]

    def _trainable_func(self, config: dict[str, Any]) -> None:
        session = get_session()
        assert session is not None
        plan, number = self._plan, self._number()
        self._scrubber.before()
        restored = session.loaded_checkpoint
        reporting = reporter.Reporting(
            send=_send,
            metrics=plan.objectives if plan.are_logged else (),
            every_n_epochs=plan.every_n_epochs,
            saves=plan.saves,
            restore_from=Path(restored.path) if restored is not None else None,
        )
        try:
            with failures_in_words():
                _, cfg = compose(plan.job, plan.space, config, number, plan.sweep_dir)
                directory = plan.job.output_dir(cfg)
            with output_to(directory / LOG_FILE), _reporting(reporting), failures_in_words():
                value = _run(plan.job, cfg, reporting)
                if reporting.stopped:
                    raise SystemExit(0)
                # One that went on from the last epoch of another has nothing to add.
                if reporting.sent or restored is None:
                    _report_end(plan, reporting, value)
                self._warn_of_threads()
        finally:
            self._scrubber.after()
        session.report({RESULT_DUPLICATE: True})

    def _warn_of_threads(self) -> None:
        if threads := self._scrubber.threads_left():
            log.warning(
                "Left running, and nobody can end them but the end of the process: threads %s. With"
                " hydra.sweeper.reuse_actors=false each trial has a process of its own.",
                ", ".join(threads),
            )

    def _number(self) -> int:
        assert self._storage is not None
        return int(self._storage.trial_dir_name or 0)


def _run(job: Job, cfg: Any, reporting: reporter.Reporting) -> Any:
    try:
        return job.run(cfg)
    except SystemExit as end:
        if reporting.stopped:
            raise
        raise RuntimeError(f"the job ended itself by sys.exit({end.code!r})") from end


def _send(metrics: dict[str, Any], directory: Path | None) -> None:
    session = get_session()
    assert session is not None
    checkpoint = Checkpoint.from_directory(str(directory)) if directory is not None else None
    session.report(metrics, checkpoint=checkpoint)


def _report_end(plan: TrialPlan, reporting: reporter.Reporting, value: Any) -> None:
    """Report what the job returned, where that is its result."""
    if plan.are_logged and reporting.sent:
        return
    try:
        values = _by_objective(plan, value)
    except (KeyError, TypeError, ValueError):
        logged = ", ".join(sorted(reporting.seen)) or "nothing"
        names = ", ".join(plan.objectives)
        raise MetricMissingError(
            f"hydra.sweeper.metric={names} was never logged; logged were: {logged}"
            if plan.are_logged
            else f"the job returned {value!r} and named no metric; set hydra.sweeper.metric to one"
            f" of those it logs ({logged})"
        ) from None
    for number in values.values():
        if number != number:
            raise reporter.NotFiniteError(f"the job returned {number}")
    _send({**values, **reporting.best_checkpoint}, None)


def _by_objective(plan: TrialPlan, value: Any) -> dict[str, float]:
    """What a job returns: a number, or several by name or in the order of the objectives."""
    names = plan.objectives
    if isinstance(value, dict):
        return {name: float(value[name]) for name in names}
    values = [value] if len(names) == 1 else value
    return {name: float(item) for name, item in zip(names, values, strict=True)}


@contextlib.contextmanager
def _reporting(reporting: reporter.Reporting) -> Iterator[None]:
    reporter.begin(reporting)
    try:
        yield
    finally:
        reporter.end()
