"""Update the records of trials from Ray Tune's events."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from typing_extensions import override

from lightning_mgpu._compat import ray_tune
from lightning_mgpu._compat.ray import actor_id
from lightning_mgpu._compat.ray_tune import trial_number
from lightning_mgpu.sweep.driver.endings import Endings
from lightning_mgpu.sweep.driver.interrupts import Interrupts
from lightning_mgpu.sweep.job.oom_retry import HALVINGS
from lightning_mgpu.sweep.store.journal import Journal
from lightning_mgpu.sweep.store.records import BEST_CHECKPOINT, FINAL, SAVED, Records, TrialRecord
from lightning_mgpu.sweep.trial.failures import SweepTrial, explain
from lightning_mgpu.sweep.trial.output import LOG_FILE

_OF_RAY = {"time_this_iter_s", "time_total_s", "time_since_restore"}

Listener = Callable[[TrialRecord | None], None]


class RecordingCallback(Callback):
    """Ray Tune callback that turns events into records.

    Args:
        records: Those of an earlier run of the sweep, if it is resumed.
        active: The searched values that a trial has, of those that were drawn.
        describe: Overrides and directory of a trial, by its number and values.
        listener: Called with a record when its trial ends, and with `None` now and then.
        journal: Written as it goes, for the report.
        interrupts: Signals, the first of which ends the search.
        kind: What the trials are made; says which of those that fail run again.
    """

    def __init__(
        self,
        records: Records,
        active: Callable[[dict[str, Any]], dict[str, Any]],
        describe: Callable[[int, dict[str, Any]], tuple[list[str], Path]],
        listener: Listener,
        journal: Journal,
        interrupts: Interrupts,
        kind: type[SweepTrial] = SweepTrial,
    ) -> None:
        self.records = records
        self._active = active
        self._describe = describe
        self._listener = listener
        self._journal = journal
        self._interrupts = interrupts
        self._kind = kind
        self._endings: Endings | None = None
        self._controller: ray_tune.Controller | None = None
        self._has_ended_any = False  # since the last step
        self._stopped: set[str] = set()
        self._paused: set[str] = set()
        self._started: dict[int, float] = {}

    @property
    def interrupted(self) -> bool:
        """Whether a signal has ended the sweep."""
        return self._interrupts.signum is not None

    def watch(self, scheduler: TrialScheduler, patience: float, endings: Endings) -> None:
        """Note the trials that the scheduler stops; those cut short by the sweep run again.

        The last ones have `patience` seconds to end when the sweep does.
        """
        self._endings = endings

        def added(controller: ray_tune.Controller, trial: Trial) -> None:
            if self._controller is None:
                controller.survive_lost_actors()
            self._controller = controller
            self._set_patience(patience)
            if trial.status == Trial.TERMINATED and not self._has_ended(trial):
                controller.run_again(trial)

        def stopped(trial: Trial) -> None:
            self._stopped.add(trial.trial_id)

        ray_tune.follow(scheduler, added, stopped)

    @override
    def setup(self, *_: Any, **__: Any) -> None:
        self._interrupts.end_search(lambda: self._set_patience(0))

    @override
    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        for trial in trials:
            self._kind.take_over(trial)

    @override
    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        for trial in trials:
            if trial.status == "PAUSED":
                if trial.trial_id not in self._paused:
                    self._journal.pause(trial_number(trial))
                self._paused.add(trial.trial_id)
            elif self.interrupted and (actor := ray_tune.actor_of(trial)) is not None:
                # Ray would ask the actors to end, and wait; what it saves next is not changed.
                ray.kill(actor)
            elif trial.status == "TERMINATED" and not self.interrupted:
                self._cut_short(trial)
        if self._has_ended_any:
            # Ray itself saves every few seconds. A trial that has ended must not run once more.
            assert self._controller is not None
            self._controller.save()
            self._has_ended_any = False
        self._listener(None)

    @override
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        record = self._record(trial)
        record.status, record.ended_by = "running", None
        if not trial.has_checkpoint():  # it starts, perhaps once more
            record.restart()
        self._paused.discard(trial.trial_id)
        self._started[record.number] = time.monotonic()
        actor = ray_tune.actor_of(trial)
        self._journal.start(record, "" if actor is None else actor_id(actor))

    @override
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        record = self._record(trial)
        record.checkpoint = result.get(BEST_CHECKPOINT, record.checkpoint)
        record.metrics = _metrics(result)
        if result.get(FINAL):
            record.restart()
        if self.records.metric in result:
            epoch = None if result.get(FINAL) else result.get("epoch")  # that is no one epoch's
            record.report(float(result[self.records.metric]), epoch)
        record.saved |= dict(result.get(SAVED, ()))
        self._journal.report(record, result)

    @override
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        is_stopped = trial.trial_id in self._stopped | self._paused
        is_stopped = is_stopped and not trial.last_result.get(FINAL)  # its job was over
        if self.interrupted:
            return
        record = self._record(trial)
        if is_stopped:
            assert self._endings is not None, "a search without `watch`"
            record.ended_by = self._endings.stopped(trial.last_result)
            if self._controller is not None:
                self._controller.mark_ended(trial)
        self._end(record, "stopped" if is_stopped else "done")

    @override
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.interrupted:
            return
        record = self._record(trial)
        record.failures += 1
        record.reason = explain(trial, Path(record.directory) / LOG_FILE)
        record.restart()
        self._journal.retry(record)

    @override
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.interrupted:
            return
        record = self._record(trial)
        record.failures += 1
        record.reason = explain(trial, Path(record.directory) / LOG_FILE)
        if trial.lacks_metric and not self.records.has_results():
            self.records.fatal = f"trial {record.number}: {record.reason}"
            self._set_patience(0)  # the others would have no result either
        self._end(record, "failed")

    @override
    def get_state(self) -> dict[str, Any]:
        return {"trials": self.records.trials}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self.records.trials = state["trials"]
        for record in self.records.trials.values():
            if record.status == "running":
                record.status = "waiting"

    def _set_patience(self, seconds: float) -> None:
        """Set the seconds that trials may take to end with the sweep; Ray's default is ten."""
        if self._controller is not None:
            self._controller.set_patience(seconds)

    def _has_ended(self, trial: Any) -> bool:
        record = self.records.trials.get(trial_number(trial))
        return record is not None and record.status in ("done", "stopped", "failed")

    def _cut_short(self, trial: Any) -> None:
        """Record trials that end because the sweep does, for which Ray sends no event."""
        record = self.records.trials.get(trial_number(trial))
        if record is not None and record.status in ("running", "waiting"):
            record.ended_by = None if self._endings is None else self._endings.cut_short()
            self._end(record, "unfinished")

    def _end(self, record: TrialRecord, status: str) -> None:
        record.status = status
        self._has_ended_any = True
        started = self._started.pop(record.number, None)
        record.seconds += time.monotonic() - started if started is not None else 0.0
        self._journal.end(record)
        self._listener(record)

    def _record(self, trial: Any) -> TrialRecord:
        number = trial_number(trial)
        record = self.records.trials.get(number)
        values, halvings = self._active(trial.config), trial.config.get(HALVINGS, 0)
        if record is None or (record.values, record.halvings) != (values, halvings):
            overrides, directory = self._describe(number, trial.config)
            new = TrialRecord(number, values, overrides, str(directory), halvings=halvings)
            if record is not None:  # population-based training, or out of memory
                record.change(new.values, new.overrides)
                record.halvings = halvings
                return record
            record = self.records.trials[number] = new
        return record


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Metrics reported by the trial itself, without those that Ray adds."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, float) and name not in _OF_RAY
    }
