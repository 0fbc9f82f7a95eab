"""Data of a sweep for its report."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

STATUSES = ("done", "stopped", "failed", "unfinished")
"""How a trial can have ended; ``stopped`` is by the scheduler."""


@dataclass(frozen=True)
class Dimension:
    """A searched value.

    Attributes:
        choices: Among which it was chosen; `None` for a number between two others.
        log: Whether it was drawn on a logarithmic scale.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Report:
    """One report of a trial.

    Attributes:
        epoch: Counted from 0; `None` if the job only returned a value.
        stretch: The index of the trial's stretch in which it came.
    """

    epoch: int | None
    metrics: dict[str, float]
    stretch: int


@dataclass
class Stretch:
    """Uninterrupted time of a trial on one worker, in seconds since the epoch.

    Attributes:
        outcome: One of `STATUSES`, or ``paused``.
    """

    start: float
    end: float
    worker: str
    host: str = ""
    outcome: str = "unfinished"


@dataclass
class Trial:
    """One trial.

    Attributes:
        params: Its values by name; where they have changed, those with which it reported its value.
        directory: Its directory, from that of the sweep; empty if it is not known.
        command: The command line that runs it alone with these.
        reason: Why it failed.
    """

    number: int
    params: dict[str, Any]
    command: str = ""
    directory: str = ""
    status: str = "unfinished"
    reason: str = ""
    stretches: list[Stretch] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds on workers."""
        return sum(stretch.end - stretch.start for stretch in self.stretches)


@dataclass
class SweepHistory:
    """A sweep so far.

    Attributes:
        sessions: When it was begun, and each time it was resumed.
    """

    directory: Path
    metric: str
    mode: str
    takes_best: bool
    search_alg: str
    scheduler: str
    dimensions: list[Dimension]
    trials: list[Trial]
    sessions: list[float]

    def history(self, trial: Trial) -> list[tuple[float, float]]:
        """Position in epochs and value of each report with the metric."""
        places = self._places(trial)
        values = (report.metrics.get(self.metric) for report in trial.reports)
        found = zip(places, values, strict=True)
        return [(at, value) for at, value in found if value is not None and math.isfinite(value)]

    def value(self, trial: Trial) -> float | None:
        """Value of a trial; `None` for a failed one."""
        values = [value for _, value in self.history(trial)]
        if not values or trial.status == "failed":
            return None
        if not self.takes_best:
            return values[-1]
        return max(values) if self.mode == "max" else min(values)

    def stretch(self, trial: Trial) -> int:
        """Index of the stretch in which a trial reported its value, or of its last one."""
        found = [
            (value, report.stretch)
            for report in trial.reports
            if (value := report.metrics.get(self.metric)) is not None and math.isfinite(value)
        ]
        if not found:
            return len(trial.stretches) - 1
        if not self.takes_best:
            return found[-1][1]
        best = max if self.mode == "max" else min
        return best(found, key=lambda pair: pair[0])[1]

    def valued(self) -> list[tuple[Trial, float]]:
        """Trials that have a value."""
        both = [(trial, self.value(trial)) for trial in self.trials]
        return [(trial, value) for trial, value in both if value is not None]

    def best(self) -> Trial | None:
        """The best trial; of equal ones the first."""
        sign = -1 if self.mode == "max" else 1
        found = min(self.valued(), key=lambda pair: (sign * pair[1], pair[0].number), default=None)
        return None if found is None else found[0]

    @cached_property
    def has_epochs(self) -> bool:
        """Return whether trials have reported by the epoch."""
        reports = [report for trial in self.trials for report in trial.reports]
        return bool(reports) and all(report.epoch is not None for report in reports)

    def epochs(self, trial: Trial) -> float:
        """Epochs of a trial so far; without epochs, its number of reports."""
        return max(self._places(trial), default=0.0)

    @cached_property
    def longest(self) -> float:
        """Epochs of the longest trial."""
        return max((self.epochs(trial) for trial in self.trials), default=0.0)

    def saved(self, trial: Trial) -> float:
        """Epochs saved by stopping a trial, compared with the longest."""
        return self.longest - self.epochs(trial) if trial.status == "stopped" else 0.0

    def _places(self, trial: Trial) -> list[float]:
        """Position of each report in epochs: the one at the end of the first epoch is at 1."""
        if not self.has_epochs:
            return [float(number + 1) for number in range(len(trial.reports))]
        places, seen = [], Counter[tuple[int, int | None]]()
        for report in trial.reports:
            assert report.epoch is not None
            key = (report.stretch, report.epoch)
            seen[key] += 1
            places.append(report.epoch + seen[key] / self._most_within_an_epoch)
        return places

    @cached_property
    def _most_within_an_epoch(self) -> int:
        """Most reports within an epoch, as from validations in its middle."""
        counted = Counter(
            (trial.number, report.stretch, report.epoch)
            for trial in self.trials
            for report in trial.reports
        )
        return max(counted.values(), default=1)
