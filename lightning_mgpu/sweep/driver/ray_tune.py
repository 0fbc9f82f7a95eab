"""Run a prepared sweep with Ray Tune."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray.tune
from ray.tune import CheckpointConfig, ResumeConfig
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from lightning_mgpu._compat.ray import deaths_unprinted
from lightning_mgpu._compat.ray_tune import trial_number
from lightning_mgpu.sweep.driver.endings import Endings
from lightning_mgpu.sweep.driver.interrupts import Interrupts
from lightning_mgpu.sweep.driver.progress import Progress
from lightning_mgpu.sweep.driver.saving import results_saved
from lightning_mgpu.sweep.driver.sweep_connection import connected_to_ray
from lightning_mgpu.sweep.driver.tune_callback import RecordingCallback
from lightning_mgpu.sweep.search.schedulers import build_scheduler
from lightning_mgpu.sweep.search.searchers import Trials, build_searcher
from lightning_mgpu.sweep.search.stopper import SweepStopper
from lightning_mgpu.sweep.settings.extent import extent
from lightning_mgpu.sweep.settings.nodes import is_population, needs_checkpoints, stops_early
from lightning_mgpu.sweep.store.journal import Journal
from lightning_mgpu.sweep.store.notices import Notices
from lightning_mgpu.sweep.store.records import TrialRecord
from lightning_mgpu.sweep.store.study import OptunaStudy
from lightning_mgpu.sweep.store.tune_state import FOLDER, StateKeeper
from lightning_mgpu.sweep.trial.failures import SweepTrial, retrying
from lightning_mgpu.sweep.trial.resources import requests_of
from lightning_mgpu.sweep.trial.trainable import END_SECONDS, HydraTrial
from lightning_mgpu.sweep.trial.trial_plan import TrialPlan
from lightning_mgpu.variables import restored

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf
    from lightning_mgpu.sweep.settings.prepared import PreparedSweep

log = logging.getLogger(__name__)

# Of Ray Tune: the console and Ctrl-C are ours, and so are the files of a trial.
_VARIABLES = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "8",
}
_CHECKPOINT_SECONDS = "2"  # what a SIGKILL of the driver may cost


class Algorithms(NamedTuple):
    """What draws values, what stops trials, and where Optuna finds them."""

    searcher: Searcher
    scheduler: TrialScheduler
    study: OptunaStudy | None

    @classmethod
    def of(cls, sweep: "PreparedSweep") -> "Algorithms":
        """Make them, before anything starts.

        Raises:
            ConfigError: One does not take its arguments, or the study's storage cannot be used.
        """
        options, objectives = sweep.options, sweep.records.objectives
        scheduler = build_scheduler(options, sweep.space, sweep.reports)
        searcher = build_searcher(options, sweep.space, objectives)
        if options.max_concurrent_trials is not None and not searcher.set_max_concurrency(
            options.max_concurrent_trials
        ):
            searcher = ConcurrencyLimiter(searcher, options.max_concurrent_trials)
        study = None
        if options.optuna_storage is not None:
            resumes = options.resume is not None
            given = (options.optuna_storage, sweep.space, sweep.records, sweep.directory, resumes)
            study = OptunaStudy(*given)
        return cls(searcher, scheduler, study)


def tune(sweep: "PreparedSweep", algorithms: Algorithms, interrupts: Interrupts) -> str | None:
    """Run the trials that are left, and write the results.

    Returns:
        Why the sweep ended early, if it did.

    Raises:
        ConfigError: The options do not fit the cluster.
        SweepFailedError: The search itself has failed.
    """
    options = sweep.options
    log.info("%s", extent(options, sweep.space, sweep.num_samples))
    if options.metric is None and stops_early(options):
        log.info(
            "hydra.sweeper.metric is not set, so trials run to their end and the job's return"
            " value counts (hydra.sweeper.mode=%s).",
            options.mode,
        )
    with (
        Journal(sweep.directory) as journal,
        deaths_unprinted(),
        connected_to_ray(options.ray),
        _quiet_tune(),
        results_saved(sweep, interrupts),
        Progress(sweep.records, sweep.num_samples) as show,
        requests_of(sweep) as requests,
        Notices(sweep.directory) as notices,
    ):
        interrupts.listen()
        retries = options.on_oom == "retry_smaller"
        kind = retrying(sweep.smaller) if retries else SweepTrial
        journal.begin(options, sweep.space, sweep.records)

        def listen(record: TrialRecord | None) -> None:
            show(record)
            if algorithms.study is not None:
                algorithms.study.add(record)

        watcher = RecordingCallback(
            sweep.records, sweep.space.active, sweep.describe, listen, journal, interrupts, kind
        )
        stopper = SweepStopper(sweep.records, options.max_failure_rate, options.time_budget_s)
        _run(sweep, algorithms, watcher, stopper, notices, requests.hides_gpus)
        if algorithms.study is not None:
            algorithms.study.add_all()
        return stopper.why


def _run(
    sweep: "PreparedSweep",
    algorithms: Algorithms,
    watcher: RecordingCallback,
    stopper: SweepStopper,
    notices: Notices,
    hides_gpus: bool,
) -> None:
    options, objectives = sweep.options, sweep.records.objectives
    # Ray itself compares by one metric only, and has nothing to compare for several.
    metric, mode = objectives[0] if len(objectives) == 1 else (None, None)
    watcher.watch(algorithms.scheduler, END_SECONDS, Endings(options.scheduler, stopper))
    plan = TrialPlan(
        job=sweep.job,
        space=sweep.space,
        sweep_dir=sweep.directory,
        objectives=tuple(objective.name for objective in objectives),
        are_logged=options.metric is not None,
        every_n_epochs=options.every_n_epochs,
        saves=options.keep_checkpoints > 0 or needs_checkpoints(options),
        threads=max(1, int(options.resources_per_trial.cpu)),
        better=objectives[0].mode if sweep.records.takes_best else None,
    )
    keeper = StateKeeper(sweep.directory)
    if options.resume is not None:
        keeper.put_back()
    ray.tune.run(
        HydraTrial.of(plan, hides_gpus),
        name=f"{sweep.directory.name}/{FOLDER}",
        storage_path=str(sweep.directory.parent),
        metric=metric,
        mode=mode,
        num_samples=sweep.num_samples,
        search_alg=Trials(
            algorithms.searcher, sweep.num_samples, objectives, sweep.records.takes_best
        ),
        scheduler=algorithms.scheduler,
        stop=stopper,
        reuse_actors=options.reuse_actors,
        max_failures=options.max_failures,
        checkpoint_config=CheckpointConfig(num_to_keep=_checkpoints_kept(options)),
        trial_name_creator=_name,
        trial_dirname_creator=_directory_name,
        callbacks=[watcher, keeper, notices],
        resume_config=ResumeConfig() if options.resume is not None else None,
        raise_on_failed_trial=False,
        verbose=0,
    )
    keeper.take()
    keeper.clear()
    if options.keep_checkpoints:
        trials = sweep.records.ordered()
        keeper.show_checkpoints({trial.number: Path(trial.directory) for trial in trials})


def _checkpoints_kept(options: "RayTuneSweeperConf") -> int | None:
    if is_population(options):
        return None  # a trial may go on from any checkpoint of another
    return options.keep_checkpoints or 1


def _name(trial: Any) -> str:
    return str(trial_number(trial))


def _directory_name(trial: Any) -> str:
    """Directory name of a new trial; removes a directory that a killed driver left there."""
    name = _name(trial)
    # Where that one left its directory, on the same Ray, this one would get another name.
    shutil.rmtree(Path(trial.local_experiment_path) / name, ignore_errors=True)
    return name


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Run Ray Tune without its own output and its own handling of Ctrl-C."""
    variables = {**_VARIABLES, "TUNE_GLOBAL_CHECKPOINT_S": _CHECKPOINT_SECONDS}
    logger = logging.getLogger("ray.tune")
    level, logger.level = logger.level, logging.CRITICAL
    with restored(*variables):
        os.environ.update(variables)
        try:
            yield
        finally:
            logger.setLevel(level)
