"""Show a sweep's progress: a live table in a terminal, else a line per trial."""

import logging
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from lightning_mgpu.format import clock, short_names
from lightning_mgpu.sweep.space.space import encode
from lightning_mgpu.sweep.store.records import Records, TrialRecord

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

_ROWS = 12  # in the live table, which must fit a terminal
_BEST = 5  # of several best ones, below it
_SHORTEST = 6  # characters of a name
_EDGE = 3  # characters around a cell
_REFRESH_SECONDS = 0.5
_ENOUGH = 2  # ended trials for an estimate: the first has the start of processes in it


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
        return f"Trial {record.number} {_status(record)}: {result} ({values}). {ended}{about}."

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
            caption += f"\nbest so far: trial {record.number}, {self._values(record)}"
        trials = records.ordered()
        names = list(dict.fromkeys(name for record in trials for name in record.values))
        metrics = [objective.name for objective in records.objectives]
        shown = _to_show(trials, best)
        rows = [self._row(record, names, metrics) for record in shown]
        others = ("status", "reports", *metrics)
        heads = _heads(list(short_names(names).values()), others, rows, self._console.width)
        columns = [Column(head, overflow="fold") for head in heads]
        table = Table("trial", *columns, *others, caption=caption)
        for record, row in zip(shown, rows, strict=True):
            table.add_row(*row, style="bold" if record in best else None)
        return table

    def _row(self, record: TrialRecord, names: list[str], metrics: list[str]) -> list[str]:
        values = self._records.values(record) or {}
        searched = (self._records.setting(record) if values else record.present).values
        return [
            str(record.number),
            *(_short(searched[name]) if name in searched else "–" for name in names),
            _status(record),
            str(len(record.history)),
            *(f"{values[name]:.4g}" if name in values else "" for name in metrics),
        ]

    def seconds_left(self) -> float | None:
        """Estimated seconds left; `None` before two trials have ended, and after the last."""
        ended = self._ended() - self._ended_before
        if self._started is None or ended < _ENOUGH or self._ended() >= self._total:
            return None
        return (time.monotonic() - self._started) / ended * (self._total - self._ended())

    def _result(self, record: TrialRecord) -> str:
        best = " (best so far)" if record in self._records.front() else ""
        return self._values(record) + best

    def _values(self, record: TrialRecord) -> str:
        values = self._records.values(record)
        if values is None:
            return "no result"
        return " ".join(f"{name}={value:.4g}" for name, value in values.items())

    def _ended(self) -> int:
        return self._records.count("done", "stopped", "failed")


def _to_show(trials: list[TrialRecord], best: list[TrialRecord]) -> list[TrialRecord]:
    running = [record for record in trials if record.status == "running"]
    ended = [record for record in trials if record.status not in ("running", "waiting")]
    shown = {record.number for record in [*running, *ended[-max(0, _ROWS - len(running)) :]]}
    shown |= {record.number for record in best[:_BEST]}
    return [record for record in trials if record.number in shown]


def _heads(
    names: list[str], others: tuple[str, ...], rows: list[list[str]], width: int
) -> list[str]:
    """Names of the searched values, cut at their start as far as a terminal of that width needs.

    Their ends differ most: `model.net.lin1_size` and `model.net.lin2_size`. Two never look alike.
    """
    heads = names
    for room in range(max(map(len, names), default=0), _SHORTEST - 1, -1):
        cut = [name if len(name) <= room else f"…{name[1 - room :]}" for name in names]
        if len(set(cut)) < len(cut):
            break
        heads = cut
        columns = zip(*rows, ("trial", *heads, *others), strict=True)
        if sum(max(map(len, column)) + _EDGE for column in columns) < width:
            break
    return heads


def _status(record: TrialRecord) -> str:
    by = f" ({record.ended_by})" if record.ended_by is not None else ""
    return f"{record.status}{by}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else encode(value)
