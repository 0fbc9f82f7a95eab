"""What is known of each trial."""

from dataclasses import dataclass, field
from typing import Any

__all__: list[str] = []

OBJECTIVE = "objective"
"""The metric's name where the job names none: what it returns."""


@dataclass
class TrialRecord:
    """One trial, as the driver sees it.

    Attributes:
        status: waiting, running, done, stopped (by the scheduler) or failed.
        history: The metric, report by report.
        metrics: All metrics of the latest report.
        checkpoint: The best one that the job itself has saved.
        reason: Why it failed.
        halvings: How often its batch was halved, since it ran out of memory.
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

    def value(self, mode: str, takes_best: bool) -> float | None:
        """What the trial is worth so far."""
        if not self.history:
            return None
        if not takes_best:
            return self.history[-1]
        return max(self.history) if mode == "max" else min(self.history)


@dataclass
class Records:
    """All trials of a sweep, by number."""

    metric: str
    mode: str
    takes_best: bool
    trials: dict[int, TrialRecord] = field(default_factory=dict)

    def value(self, record: TrialRecord) -> float | None:
        """What a trial is worth."""
        return record.value(self.mode, self.takes_best)

    def best(self) -> TrialRecord | None:
        """The best trial that did not fail; of equal ones the first."""
        sign = -1 if self.mode == "max" else 1
        valued = [
            (sign * value, record.number)
            for record in self.trials.values()
            if record.status != "failed" and (value := self.value(record)) is not None
        ]
        return self.trials[min(valued)[1]] if valued else None

    def count(self, *statuses: str) -> int:
        """How many trials have one of these statuses."""
        return sum(record.status in statuses for record in self.trials.values())

    def ordered(self) -> list[TrialRecord]:
        """By number."""
        return [self.trials[number] for number in sorted(self.trials)]
