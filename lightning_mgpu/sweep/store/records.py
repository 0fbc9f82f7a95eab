"""Records of trials."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_mgpu.sweep.space.objectives import Objective, dominates

BEST_CHECKPOINT = "best_checkpoint"
"""Among what a trial reports: where the best checkpoint lies that its job has saved."""
SAVED = "saved"
"""Among what a trial reports: checkpoints saved since the last report, each a path and an epoch."""

FINAL = "is_final"
"""Among what a trial reports: that nothing which it reported before counts."""

_AT_LEAST = 3  # ended trials, to say anything about a rate


@dataclass(frozen=True)
class Setting:
    """What a trial has trained with for some reports.

    Attributes:
        values: The searched values.
        overrides: The same for the command line, with all others.
        checkpoint: Of the epoch whose value counts if it was kept, or else the best one that the
            job had saved by then.
        epoch: Whose value counts; `None` if that is unknown.
        checkpoint_epoch: In which the checkpoint was saved; `None` if that is unknown.
    """

    values: dict[str, Any]
    overrides: list[str]
    checkpoint: str | None
    epoch: int | None = None
    checkpoint_epoch: int | None = None

    @property
    def is_of_another_epoch(self) -> bool:
        """Whether the checkpoint is known to be of another epoch than the value."""
        known = None not in (self.epoch, self.checkpoint_epoch)
        return known and self.epoch != self.checkpoint_epoch


@dataclass
class TrialRecord:
    """Record of one trial in the driver.

    Attributes:
        status: waiting, running, done, stopped (by the scheduler), failed, or unfinished when the
            sweep ended.
        history: The metric, report by report.
        epochs: The epoch of each of these reports, if it was in one.
        metrics: All metrics of the latest report.
        checkpoint: The best one that the job itself has saved.
        saved: Checkpoints by path, and the epoch in which each was written last.
        reason: Why it failed.
        ended_by: What ended it, if not the trial itself: the scheduler, or an option of the sweep.
        halvings: How often its batch was halved, since it ran out of memory.
        past: What it had before its present values, and how many reports there were by then;
            population-based training changes values.
    """

    number: int
    values: dict[str, Any]
    overrides: list[str]
    directory: str
    status: str = "waiting"
    history: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    reason: str | None = None
    failures: int = 0
    halvings: int = 0
    seconds: float = 0.0
    ended_by: str | None = None
    past: tuple[tuple[int, Setting], ...] = ()
    epochs: list[int | None] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)

    def value(self, mode: str, takes_best: bool) -> float | None:
        """Value of the trial so far."""
        place = self._place(mode, takes_best)
        return None if place is None else self.history[place]

    def setting(self, mode: str, takes_best: bool) -> Setting:
        """What the trial had when it reported its value; without a value, what it has."""
        place = self._place(mode, takes_best)
        for count, setting in self.past:
            if place is not None and place < count:
                return setting
        known = place is not None and place < len(self.epochs)
        epoch = self.epochs[place] if known and place is not None else None
        found = self._checkpoint_of(epoch)
        return replace(
            self.present,
            checkpoint=found,
            epoch=epoch,
            checkpoint_epoch=self.saved.get(found or ""),
        )

    def _checkpoint_of(self, epoch: int | None) -> str | None:
        """A checkpoint of that epoch, if one is there, or else the best one."""
        if epoch is None or self.saved.get(self.checkpoint or "", epoch) == epoch:
            return self.checkpoint
        there = (p for p, written in self.saved.items() if written == epoch and Path(p).exists())
        return next(there, self.checkpoint)

    def report(self, value: float, epoch: int | None) -> None:
        """Add a report."""
        self.history.append(value)
        self.epochs.append(epoch)

    @property
    def present(self) -> Setting:
        """What the trial has now."""
        return Setting(self.values, self.overrides, self.checkpoint)

    def change(self, values: dict[str, Any], overrides: list[str]) -> None:
        """Go on with other values."""
        self.past = (*self.past, (len(self.history), self.present))
        self.values, self.overrides = values, overrides

    def restart(self) -> None:
        """Start again, as if nothing had been reported."""
        self.history.clear()
        self.epochs.clear()
        self.saved.clear()
        self.past = ()

    def _place(self, mode: str, takes_best: bool) -> int | None:
        """Index of the report that counts."""
        if not self.history or not takes_best:
            return len(self.history) - 1 if self.history else None
        return self.history.index(max(self.history) if mode == "max" else min(self.history))


@dataclass
class Records:
    """All trials of a sweep, by number.

    Attributes:
        metric: What is optimised, or the first of it.
        others: What else is optimised; then the latest report of a trial counts.
        fatal: Why the sweep cannot go on, if it cannot.
    """

    metric: str
    mode: str
    takes_best: bool
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    others: tuple[Objective, ...] = ()
    fatal: str | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All objectives."""
        return (Objective(self.metric, self.mode), *self.others)

    def value(self, record: TrialRecord) -> float | None:
        """Value of a trial by the first objective."""
        return record.value(self.mode, self.takes_best)

    def setting(self, record: TrialRecord) -> Setting:
        """What a trial had when it reported its value by the first objective."""
        return record.setting(self.mode, self.takes_best)

    def best(self) -> TrialRecord | None:
        """The best trial that did not fail; of equal ones the first."""
        sign = -1 if self.mode == "max" else 1
        valued = [
            (sign * value, record.number)
            for record in self.trials.values()
            if record.status != "failed" and (value := self.value(record)) is not None
        ]
        return self.trials[min(valued)[1]] if valued else None

    def values(self, record: TrialRecord) -> dict[str, float] | None:
        """Values of a trial by each objective."""
        value = self.value(record)
        if value is None or any(other.name not in record.metrics for other in self.others):
            return None
        return {self.metric: value, **{o.name: record.metrics[o.name] for o in self.others}}

    def front(self) -> list[TrialRecord]:
        """Pareto front: the trials that no other one dominates."""
        if not self.others:
            best = self.best()
            return [] if best is None else [best]
        modes = [objective.mode for objective in self.objectives]
        valued = [
            (record, list(values.values()))
            for record in self.ordered()
            if record.status != "failed" and (values := self.values(record)) is not None
        ]
        return [
            record
            for record, own in valued
            if not any(dominates(other, own, modes) for _, other in valued)
        ]

    def has_results(self) -> bool:
        """Return whether some trial has reported the metric."""
        return any(record.history for record in self.trials.values())

    def count(self, *statuses: str) -> int:
        """Number of trials with one of these statuses."""
        return sum(record.status in statuses for record in self.trials.values())

    def too_many_failed(self, rate: float) -> bool:
        """Return whether more than this share of the ended trials have failed."""
        failed = self.count("failed")
        ended = failed + self.count("done", "stopped")
        return ended >= _AT_LEAST and failed / ended > rate

    def ordered(self) -> list[TrialRecord]:
        """Records ordered by number."""
        return [self.trials[number] for number in sorted(self.trials)]
