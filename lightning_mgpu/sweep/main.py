"""Run a sweep and show its results."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import CompactHydraException

from lightning_mgpu.errors import ConfigError, SweepFailedError, one_line
from lightning_mgpu.ray.address import (
    address_of,
    is_client,
    is_connected_as_client,
    source_of,
)
from lightning_mgpu.sweep.driver.interrupts import Interrupts
from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.job.nested import refuse_nested
from lightning_mgpu.sweep.job.submitted import receive
from lightning_mgpu.sweep.settings.prepared import PreparedSweep
from lightning_mgpu.sweep.store.lock import locked
from lightning_mgpu.sweep.store.records import Records, TrialRecord
from lightning_mgpu.sweep.store.results import RESULTS, job_command, relative, resume_command

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf
    from lightning_mgpu.sweep.driver.ray_tune import Algorithms

log = logging.getLogger(__name__)


class RefusedError(ConfigError, CompactHydraException):
    """A `ConfigError` that Hydra shows without a traceback, in any application."""


class FailedError(SweepFailedError, CompactHydraException):
    """A `SweepFailedError` that Hydra shows without a traceback, in any application."""


def run(job: Job, options: "RayTuneSweeperConf", arguments: Sequence[str]) -> None:
    """Search, show progress, and write the results to ``hydra.sweep.dir``.

    Raises:
        RefusedError: The options ask for what cannot be; nothing was started.
        FailedError: Not one trial has a result, the metric is not logged, the search failed, or the
            cluster was lost.
    """
    try:
        _run(job, options, arguments)
    except ConfigError as error:
        raise RefusedError(str(error)) from error
    except SweepFailedError as error:
        raise FailedError(str(error)) from error


def _run(job: Job, options: "RayTuneSweeperConf", arguments: Sequence[str]) -> None:
    refuse_nested()
    sent = receive()
    if sent is not None:
        options.ray, options.resume = sent.adopt(job, options.ray, options.resume)
    sweep = PreparedSweep.prepare(job, options, arguments)
    if _is_on_laptop(options.ray):
        from lightning_mgpu.sweep.client.laptop import run_on_cluster

        run_on_cluster(sweep)
        return
    # Ray, now that there is something to run
    from lightning_mgpu.sweep.driver.ray_tune import Algorithms

    algorithms = Algorithms.of(sweep)
    sweep.claim_directory()
    with locked(sweep.directory):
        _search(sweep, algorithms)


def _is_on_laptop(ray: Mapping[str, Any]) -> bool:
    """Return whether to submit the sweep to a cluster; an existing connection is used."""
    wanted, there = is_client(address_of(ray)), is_connected_as_client()
    if wanted and there is False:
        raise ConfigError(
            f"{source_of(ray, 'hydra.sweeper.ray.address')}: this process uses another Ray"
            " already. Call `ray.shutdown()` first, or remove the address."
        )
    return wanted if there is None else there


def _search(sweep: PreparedSweep, algorithms: "Algorithms") -> None:
    options = sweep.options
    from lightning_mgpu.sweep.driver.ray_tune import tune
    from lightning_mgpu.sweep.driver.saving import tell_if_interrupted

    why_early = None
    with Interrupts() as interrupts:
        why_early = tune(sweep, algorithms, interrupts)
    tell_if_interrupted(sweep, interrupts)
    if interrupts.signum is not None:
        sys.exit(128 + interrupts.signum)
    if sweep.records.fatal is not None:
        raise SweepFailedError(
            f"The sweep has ended at the first trial without its metric: {sweep.records.fatal}"
        )
    path = sweep.directory / RESULTS
    page = _draw(sweep) if options.report is not False else None
    if why_early is not None:
        _say_that_early(sweep, why_early)
    _conclude(sweep.records, path, page)


def _draw(sweep: PreparedSweep) -> Path | None:
    """Draw the report, and log a warning instead of an error if that fails."""
    from lightning_mgpu.sweep.report.draw import draw, missing

    again = f"python -m lightning_mgpu mode=report sweep={sweep.directory}"
    if missing():
        log.info(
            "For a report with pictures: pip install 'lightning_mgpu[report]', then\n  %s", again
        )
        return None
    try:
        return draw(sweep.directory)[0]
    except Exception as error:
        line = one_line(error)
        log.warning(
            "The report could not be drawn (%s: %s). Try again with: %s",
            type(error).__name__,
            line,
            again,
        )
        return None


def _say_that_early(sweep: PreparedSweep, why: str) -> None:
    """Log why there are fewer results than asked for."""
    unfinished = sweep.records.count("unfinished")
    missing = sweep.num_samples - len(sweep.records.trials)
    log.warning(
        "Stopped early, since %s: %d trials unfinished, %d not started. Resume with: %s",
        why,
        unfinished,
        missing,
        resume_command(sweep.directory),
    )


def _conclude(records: Records, path: Path, page: Path | None) -> None:
    """Log the last lines: the best trial, and how to run it again."""
    failed = [record for record in records.ordered() if record.status == "failed"]
    if failed:
        log.warning(
            "%d of %d trials failed; the first: trial %d, %s (see %s).",
            len(failed),
            len(records.trials),
            failed[0].number,
            failed[0].reason,
            relative(Path(failed[0].directory)),
        )
    files = " and ".join(relative(file) for file in (path, page) if file is not None)
    best = records.front()
    if not best:
        raise SweepFailedError(
            f"No trial has a result: {len(failed)} of {len(records.trials)} failed. The first"
            f" reason: {failed[0].reason if failed else 'none was run'}. See {files}."
        )
    lines = [line for record in best for line in _praise(records, record)]
    lines.append(f"  all results: {relative(path)}")
    if page is not None:
        lines.append(f"  report: {relative(page)}")
    log.info("\n".join(lines))


def _praise(records: Records, record: TrialRecord) -> list[str]:
    values, setting = (records.values(record) or {}).items(), records.setting(record)
    worth = " ".join(f"{name}={value:.6g}" for name, value in values)
    lines = [f"Best: trial {record.number}, {worth}"]
    lines.append(f"  run it alone: {job_command(setting.overrides)}")
    if setting.checkpoint is not None:
        note = ""
        if setting.is_of_another_epoch:
            note = (
                f" (of epoch {setting.checkpoint_epoch}, while the value is that of epoch"
                f" {setting.epoch}: give ModelCheckpoint the sweep's metric and mode)"
            )
        lines.append(f"  checkpoint: {relative(Path(setting.checkpoint))}{note}")
    return lines
