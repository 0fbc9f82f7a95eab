"""Run one trial in an actor: compose the job, run it, report its result."""

import contextlib
import functools
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from ray import tune

from lightning_mgpu._compat.namespace import choose, named
from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.job.oom_retry import compose
from lightning_mgpu.sweep.settings.prepared import holds_sweep
from lightning_mgpu.sweep.store.notices import is_known, notify
from lightning_mgpu.sweep.store.records import FINAL
from lightning_mgpu.sweep.trial.failures import (
    MetricMissingError,
    TrialFailedError,
    failures_in_words,
)
from lightning_mgpu.sweep.trial.output import LOG_FILE, output_to
from lightning_mgpu.sweep.trial.reporting import (
    FOLDS,
    NotFiniteError,
    Reporting,
    begin,
    end,
    missing,
)
from lightning_mgpu.sweep.trial.tracking import runs_ended
from lightning_mgpu.sweep.trial.trial_plan import TrialPlan

log = logging.getLogger(__name__)


class InterruptedTrialError(RuntimeError):
    """The job was interrupted from within; nobody has stopped the sweep."""


def run_trial(
    plan: TrialPlan,
    config: Mapping[str, Any],
    number: int,
    threads_left: Callable[[], list[str]],
) -> None:
    """Run the job with these values; its output goes to a file in its directory.

    At its end `threads_left` names the threads that it has started and not ended.

    Raises:
        TrialFailedError: In words, what went wrong.
        SystemExit: It was stopped.
    """
    check_storage(plan.sweep_dir)
    restored = tune.get_checkpoint()
    with failures_in_words():
        _, cfg = compose(plan.job, plan.space, config, number, plan.sweep_dir)
        directory = plan.job.output_dir(cfg)
    reporting = Reporting(
        send=_send,
        metrics=plan.objectives if plan.are_logged else (),
        every_n_epochs=plan.every_n_epochs,
        saves=plan.saves,
        restore_from=Path(restored.path) if restored is not None else None,
        strategy=_strategy(cfg),
        directory=directory,
        notify=partial(notify, plan.sweep_dir),
        has_folds=is_known(plan.sweep_dir, FOLDS),
    )
    with (
        output_to(directory / LOG_FILE),  # the outermost, as trackers wrap what they find
        runs_ended(),
        _reporting(reporting),
        failures_in_words(),
    ):
        value = _run(plan.job, cfg, reporting)
        if reporting.stopped:
            raise SystemExit(0)
        # One that went on from the last epoch of another has nothing to add.
        if reporting.sent or restored is None:
            report_end(plan, reporting, value)
        if threads := threads_left():
            log.warning(
                "The trial left threads running that cannot be stopped: %s. With"
                " hydra.sweeper.reuse_actors=false each trial has its own process.",
                ", ".join(threads),
            )


def check_storage(sweep_dir: Path) -> None:
    """Check that this machine has the directory in which the sweep was started.

    Raises:
        TrialFailedError: It has not; files of the trial would not be found where they belong.
    """
    if not holds_sweep(sweep_dir):
        raise TrialFailedError(
            f"{sweep_dir} on this machine ({platform.node()}) is not the sweep's directory."
            " Set hydra.sweep.dir to a directory on storage that all machines of the cluster"
            " share."
        )


def _strategy(cfg: DictConfig) -> str | None:
    """Our class that a config names at its top level, where our group `strategy` puts it."""
    node = cfg.get("strategy")
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return target if str(target).startswith("lightning_mgpu.") else None


def _run(job: Job, cfg: Any, reporting: Reporting) -> Any:
    """Run the job; `None` if it was stopped."""

    # Within Hydra's own function, which tells the user's callbacks how a job has ended: one that is
    # stopped early has completed, and `sys.exit` is a failure of it.
    @functools.wraps(job.task_function)
    def task(cfg: Any) -> Any:
        try:
            return job.task_function(cfg)
        except KeyboardInterrupt as error:  # no `Exception`: Ray would take it for one of its own
            raise InterruptedTrialError("the job raised KeyboardInterrupt") from error
        except SystemExit as end:
            if reporting.stopped:
                return None
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning exits with it
                raise InterruptedTrialError("the job raised KeyboardInterrupt") from end
            raise RuntimeError(f"the job called sys.exit({end.code!r})") from end

    return job.run(cfg, task)


def _send(metrics: dict[str, Any], directory: Path | None) -> None:
    checkpoint = tune.Checkpoint.from_directory(str(directory)) if directory is not None else None
    tune.report(metrics, checkpoint=checkpoint)


def report_end(plan: TrialPlan, reporting: Reporting, value: Any) -> None:
    """Report the result of a job that has not reported while it trained.

    Raises:
        MetricMissingError: The metric that the user named was neither logged nor returned by name.
        TrialFailedError: None was named, and the job returned no number.
        NotFiniteError: The result is NaN.
    """
    if reporting.has_folds and reporting.held:
        worth = _worth_of_folds(plan, reporting, value)
        reporting.send({**reporting.held[-1], **worth, FINAL: True}, None)
        return
    if plan.are_logged and reporting.sent:
        return
    values = _logged(plan, reporting, value) if plan.are_logged else _returned(plan, value)
    if values is None:
        if plan.are_logged:
            names = set(plan.objectives) - reporting.logged.keys()
            raise MetricMissingError(_missing(names, reporting, value))
        logged = ", ".join(sorted(reporting.logged)) or "nothing"
        raise TrialFailedError(
            f"the job returned {value!r} and named no metric; set hydra.sweeper.metric to one of"
            f" those it logs ({logged})"
        )
    reporting.send({**values, **reporting.best_checkpoint}, None)


def _worth_of_folds(plan: TrialPlan, reporting: Reporting, value: Any) -> dict[str, float]:
    """What a job with several runs returns, or else what the last of them has reported."""
    returned = _returned(plan, value)
    if returned is not None:
        return returned
    reports = [{name: one[name] for name in plan.objectives} for one in reporting.held]
    if plan.better is None:
        return reports[-1]
    name, better = plan.objectives[0], max if plan.better == "max" else min
    return better(reports, key=lambda one: one[name])


def _logged(plan: TrialPlan, reporting: Reporting, value: Any) -> dict[str, float] | None:
    """Metrics logged, as by `test` after training, or returned by name; `None` if one lacks."""
    named = value if isinstance(value, Mapping) else {}
    found = {**named, **reporting.logged}
    try:
        values = {name: float(found[name]) for name in plan.objectives}
    except (KeyError, TypeError, ValueError):
        return None
    for name, number in values.items():
        if not math.isfinite(number):
            raise NotFiniteError(f"{name} is {number}")
    return values


def _missing(names: set[str], reporting: Reporting, value: Any) -> str:
    words = missing(names, reporting.logged)
    if isinstance(value, (int, float)):
        words += f" The job returned {value!r}, which counts if hydra.sweeper.metric is left out."
    return words


def _returned(plan: TrialPlan, value: Any) -> dict[str, float] | None:
    """A job's return value by objective: a number, or several by name or in order."""
    names = plan.objectives
    try:
        if isinstance(value, dict):
            found = {name: float(value[name]) for name in names}
        else:
            values = [value] if len(names) == 1 else value
            found = {name: float(item) for name, item in zip(names, values, strict=True)}
    except (KeyError, TypeError, ValueError):
        return None
    for number in found.values():
        if math.isnan(number):
            raise NotFiniteError(f"the job returned {number}")
    return found


@contextlib.contextmanager
def _reporting(reporting: Reporting) -> Iterator[None]:
    begin(reporting, _callbacks)
    try:
        yield
    finally:
        end()


def _callbacks(namespace: str) -> list[Any]:
    """What to add to a new Trainer, which is of that namespace."""
    choose(named(namespace), "the trial has created a Trainer of it")
    from lightning_mgpu.sweep.trial.reporter import callbacks

    return [*callbacks()]
