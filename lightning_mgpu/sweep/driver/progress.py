"""Show a sweep's progress: a live table in a terminal, else a line per trial."""

import logging
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_mgpu.format import clock
from lightning_mgpu.sweep.space.space import encode
from lightning_mgpu.sweep.store.records import Records, TrialRecord

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

_ROWS = 12  # in the live table, which must fit a terminal
_BEST = 5  # of several best ones, below it
_REFRESH_SECONDS = 0.5


class Progress:
    """Show the records while the block lasts.

    Args:
        records: All trials so far.
        total: How many there will be.
        console: Where to; by default the standard output.
    """

    def __init__(self, records: Records, total: int, console: Console | None = None) -> None:
        self._records, self._total = records, total
        self._console = console or Console(file=sys.stdout)
        self._live: Live | None = None
        self._started: float | None = None  # when the first trial started
        self._shown = 0.0
        self._ended_before = records.count("done", "stopped", "failed")

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    def __call__(self, ended: TrialRecord | None) -> None:
        """Update after a trial has ended or time has passed."""
        if self._started is None and self._records.count("running"):
            self._started = time.monotonic()
        if self._live is None:
            if ended is not None:
                log.info("%s", self.line(ended))
        elif time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._live.update(self.table(), refresh=True)

    def line(self, record: TrialRecord) -> str:
        """Line on the outcome of one trial and the work left."""
        searched = self._records.setting(record).values
        values = " ".join(f"{name}={_short(value)}" for name, value in searched.items())
        result = record.reason if record.status == "failed" else self._result(record)
        left = self.seconds_left()
        about = f", about {clock(left)} left" if left else ""
        ended = f"{self._ended()} of {self._total}"
        if record.halvings:
            values += f", batch halved {record.halvings} times"
        return f"Trial {record.number} {record.status}: {result} ({values}). {ended}{about}."

    def table(self) -> Table:
        """Table of the running and latest trials, the best one and the work left."""
        records, best = self._records, self._records.front()
        running = records.count("running")
        caption = f"{self._ended()} of {self._total} ended, {running} running"
        if failed := records.count("failed"):
            caption += f", {failed} failed"
        if left := self.seconds_left():
            caption += f", about {clock(left)} left"
        for record in best[:_BEST]:
            caption += f"\nbest so far: trial {record.number}, {self._result(record)}"
        trials = records.ordered()
        names = list(dict.fromkeys(name for record in trials for name in record.values))
        metrics = [objective.name for objective in records.objectives]
        table = Table("trial", *names, "status", "reports", *metrics, caption=caption)
        for record in _to_show(trials, best):
            values = records.values(record) or {}
            table.add_row(
                str(record.number),
                *(_short(record.values[name]) if name in record.values else "" for name in names),
                record.status,
                str(len(record.history)),
                *(f"{values[name]:.4g}" if name in values else "" for name in metrics),
                style="bold" if record in best else None,
            )
        return table

    def seconds_left(self) -> float | None:
        """Estimated seconds left; `None` before the first trial has ended, and after the last."""
        ended = self._ended() - self._ended_before
        if self._started is None or ended <= 0 or self._ended() >= self._total:
            return None
        return (time.monotonic() - self._started) / ended * (self._total - self._ended())

    def _result(self, record: TrialRecord) -> str:
        values = self._records.values(record)
        if values is None:
            return "no result"
        best = " (best so far)" if record in self._records.front() else ""
        return " ".join(f"{name}={value:.4g}" for name, value in values.items()) + best

    def _ended(self) -> int:
        return self._records.count("done", "stopped", "failed")


def _to_show(trials: list[TrialRecord], best: list[TrialRecord]) -> list[TrialRecord]:
    running = [record for record in trials if record.status == "running"]
    ended = [record for record in trials if record.status not in ("running", "waiting")]
    shown = {record.number for record in [*running, *ended[-max(0, _ROWS - len(running)) :]]}
    shown |= {record.number for record in best[:_BEST]}
    return [record for record in trials if record.number in shown]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else encode(value)
