"""HTML table of trials."""

import math
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from lightning_mgpu.format import duration
from lightning_mgpu.sweep.report.axes import axis_of, is_number, shorten, text
from lightning_mgpu.sweep.report.model import SweepHistory, Trial

_METRIC = 2  # the column by which the rows are sorted at first


@dataclass(frozen=True)
class _Cell:
    """Table cell: text shown, and sort key (numbers first, then words, then empty cells)."""

    shown: str
    key: str | float | None
    title: str = ""
    is_name: bool = False

    def html(self) -> str:
        """HTML of the cell."""
        if isinstance(self.key, float) and math.isfinite(self.key):
            attributes = f' class="number" data-key="{self.key!r}"'
        elif self.key is None:
            attributes = ""
        else:
            attributes = f' data-key="{escape(str(self.key))}"'
        title = f' title="{escape(self.title)}"' if self.title else ""
        tag = 'th scope="row"' if self.is_name else "td"
        return f"<{tag}{attributes}{title}>{self.shown}</{tag.partition(' ')[0]}>"


def table(sweep: SweepHistory) -> str:
    """HTML table of all trials, the best first; a click on a column's head sorts by it."""
    axes = [axis_of(sweep, dimension) for dimension in sweep.dimensions]
    heads = [("trial", ""), ("status", ""), (sweep.metric, "best" if sweep.takes_best else "last")]
    heads += [(axis.label, axis.name) for axis in axes]
    heads += [("epochs" if sweep.has_epochs else "reports", ""), ("time", "on a worker")]
    has_reasons = any(trial.reason for trial in sweep.trials)
    if has_reasons:
        heads.append(("reason", "why it failed"))
    best = sweep.best()
    names = [axis.name for axis in axes]
    trials = _best_first(sweep)
    lines = [_cells(sweep, trial, names, has_reasons) for trial in trials]
    rows = [
        ('<tr class="best">' if trial is best else "<tr>")
        + "".join(cell.html() for cell in cells)
        + "</tr>"
        for trial, cells in zip(trials, lines, strict=True)
    ]
    head = "".join(
        _head(name, title, [cells[place].key for cells in lines], _order(sweep, place))
        for place, (name, title) in enumerate(heads)
    )
    return (
        f'<table id="trials"><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table>"
    )


def _best_first(sweep: SweepHistory) -> list[Trial]:
    valued = sweep.valued()
    valued.sort(key=lambda pair: pair[1], reverse=sweep.mode == "max")
    found = [trial for trial, _ in valued]
    return [*found, *(trial for trial in sweep.trials if trial not in found)]


def _order(sweep: SweepHistory, place: int) -> str:
    """How the rows are sorted by the column there, for `aria-sort`."""
    if place != _METRIC:
        return "none"
    return "descending" if sweep.mode == "max" else "ascending"


def _number(trial: Trial) -> str:
    """Number of a trial, which leads to its directory."""
    if not trial.directory:
        return str(trial.number)
    return f'<a href="{escape(quote(trial.directory))}/">{trial.number}</a>'


def _head(name: str, title: str, keys: list[str | float | None], order: str) -> str:
    """Head of a column, aligned like its cells."""
    numbers = ' class="number"' if any(isinstance(key, float) for key in keys) else ""
    return (
        f'<th scope="col" aria-sort="{order}"{numbers}>'
        f'<button type="button" title="{escape(title)}">'
        f"{escape(shorten(name, 28))}</button></th>"
    )


def _cells(sweep: SweepHistory, trial: Trial, names: list[str], has_reasons: bool) -> list[_Cell]:
    value = sweep.value(trial)
    epochs = sweep.epochs(trial)
    cells = [
        _Cell(_number(trial), float(trial.number), trial.command, is_name=True),
        _Cell(f'<span class="status {trial.status}">{trial.status}</span>', trial.status),
        _Cell("" if value is None else f"{value:.5g}", value),
    ]
    for name in names:
        if name not in trial.params:
            cells.append(_Cell("–", None))
            continue
        param = trial.params[name]
        key = float(param) if is_number(param) else text(param)
        whole = text(param)
        short = shorten(whole, 32)
        cells.append(_Cell(escape(short), key, whole if short != whole else ""))
    cells.append(_Cell(f"{epochs:.4g}", float(epochs)))
    cells.append(_Cell(duration(trial.seconds), float(trial.seconds)))
    if has_reasons:
        reason = escape(shorten(trial.reason, 90))
        cells.append(_Cell(reason, trial.reason or None, trial.reason))
    return cells
