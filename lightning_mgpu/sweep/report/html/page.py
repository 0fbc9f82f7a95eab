"""Write the report as one self-contained HTML page."""

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lightning_mgpu.format import duration
from lightning_mgpu.sweep.report.html.curves import learning_curves
from lightning_mgpu.sweep.report.html.epochs import epochs
from lightning_mgpu.sweep.report.html.parameters import importances, parallel, scatter
from lightning_mgpu.sweep.report.html.table import table
from lightning_mgpu.sweep.report.html.worker_lanes import workers
from lightning_mgpu.sweep.report.importance import Importance
from lightning_mgpu.sweep.report.lanes import WorkerTimeline, timeline
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.views import counts, has_curves, saving

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}
_COLUMN_WIDTH = 130  # of an axis of parallel coordinates, in pixels


class _Section(NamedTuple):
    """A figure, or a text in its place."""

    name: str
    title: str
    note: str
    figure: go.Figure | None
    instead: str
    width: int = 0


def write(sweep: SweepHistory, importance: Importance | None, path: Path) -> None:
    """Write the page."""
    sections = list(_sections(sweep, importance))
    links = [("all-trials", "Trials"), *((section.name, section.title) for section in sections)]
    parts = {
        "title": escape(f"Sweep {sweep.directory.name}: {sweep.metric}"),
        "heading": escape(f"Search for the {_better(sweep, 'est')} {sweep.metric}"),
        "about": _about(sweep),
        "cards": "".join(_cards(sweep)),
        "best": _best(sweep),
        "links": "".join(f'<a href="#{name}">{title}</a>' for name, title in links),
        "sections": "\n".join([_trials(sweep), *map(_html, sections)]),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
        "plotly": get_plotlyjs(),
    }
    # One after the other from the template's pieces: what is put in is not looked at again.
    first, *pieces = _asset("page.html").split("{{")
    text = first + "".join(
        parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces)
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # whole at any time


def _about(sweep: SweepHistory) -> str:
    where = sweep.directory.absolute()
    return (
        f"search: {escape(sweep.search_alg)}, scheduler: {escape(sweep.scheduler)}, in"
        f' <span title="{escape(str(where))}">{escape("/".join(where.parts[-2:]))}</span>'
    )


def _sections(sweep: SweepHistory, importance: Importance | None) -> Iterator[_Section]:
    yield from _of_results(sweep, importance)
    yield from _of_time(sweep)


def _of_results(sweep: SweepHistory, importance: Importance | None) -> Iterator[_Section]:
    yield _Section(
        "curves",
        "Learning curves",
        "Each line is a trial and ends with a mark: a cross where the scheduler stopped it."
        " Click on the legend to hide some."
        if has_curves(sweep)
        else "Each trial has reported once, so there are no curves, but results in their order.",
        learning_curves(sweep),
        "No trial has reported yet.",
    )
    yield _Section(
        "parallel",
        "Parallel coordinates",
        f"A line for each trial with a result; the darker, the {_better(sweep)}. Drag along an"
        " axis to choose some, and its name to move it.",
        parallel(sweep),
        "At least two trials must have a result.",
        _COLUMN_WIDTH * (len(sweep.dimensions) + 1),
    )
    yield _Section(
        "importance",
        "Importance",
        f"How much of the metric's variance each value explains ({importance.method})."
        " Trials that were stopped early count with what they had reached."
        if importance is not None
        else "",
        importances(sweep, importance),
        "At least five trials with different results are needed.",
    )
    yield _Section(
        "parameters",
        f"{escape(sweep.metric)} against each value",
        "Trials with a result; the star is the best.",
        scatter(sweep),
        "No trial has a result.",
    )


def _of_time(sweep: SweepHistory) -> Iterator[_Section]:
    found = timeline(sweep)
    yield _Section(
        "workers",
        "Trials on workers",
        f"{_workers(found)}, {duration(found.end)}, busy {found.busy:.0%} of the time.",
        workers(sweep),
        "No trial has started.",
    )
    yield _Section(
        "epochs",
        "Epochs saved by early stopping",
        saving(sweep),
        epochs(sweep),
        "No trial has reported a second time, so there was nothing to save."
        if any(trial.reports for trial in sweep.trials)
        else "No trial has reported the metric, so it is not known how long they have trained.",
    )


def _better(sweep: SweepHistory, ending: str = "er") -> str:
    return ("high" if sweep.mode == "max" else "low") + ending


def _html(section: _Section) -> str:
    if section.figure is None:
        content = f'<p class="note">{section.instead}</p>'
    else:
        drawn = section.figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{section.name}",
            config=_CONFIG,
        )
        drawn = f'<div style="min-width: {section.width}px">{drawn}</div>'
        content = f'<p class="note">{section.note}</p>\n<div class="scroll">{drawn}</div>'
    return f'<section id="{section.name}">\n<h2>{section.title}</h2>\n{content}\n</section>'


def _trials(sweep: SweepHistory) -> str:
    note = (
        "The best first; click on a column to sort by it. The number of a trial leads to its"
        " directory, where trial.log is."
    )
    return (
        f'<section id="all-trials">\n<h2>Trials</h2>\n<p class="note">{note}</p>'
        f'\n<div class="scroll rows" tabindex="0">{table(sweep)}</div>\n</section>'
    )


def _cards(sweep: SweepHistory) -> Iterator[str]:
    best = sweep.best()
    if best is not None:
        yield _card(f"best {sweep.metric}", f"{sweep.value(best):.5g}", f"trial {best.number}")
    else:
        yield _card(f"best {sweep.metric}", "none", "no trial has a result")
    ended = ", ".join(f"{number} {status}" for status, number in counts(sweep).items())
    yield _card("trials", str(len(sweep.trials)), ended)
    found = timeline(sweep)
    on_workers = sum(trial.seconds for trial in sweep.trials)
    yield _card("time", duration(found.end), f"{duration(on_workers)} on {_workers(found)}")
    if sweep.has_epochs:
        trained = sum(map(sweep.epochs, sweep.trials))
        saved = sum(map(sweep.saved, sweep.trials))
        share = saved / (trained + saved) if saved else 0.0
        yield _card("epochs saved", f"{share:.0%}", f"{trained:.5g} trained, {saved:.5g} saved")


def _workers(found: WorkerTimeline) -> str:
    return f"{len(found.lanes)} {'worker' if len(found.lanes) == 1 else 'workers'}"


def _card(title: str, value: str, more: str) -> str:
    return (
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
    )


def _best(sweep: SweepHistory) -> str:
    best = sweep.best()
    if best is None or not best.command:
        return ""
    return (
        f'<div class="command"><code id="best-command">{escape(best.command)}</code>'
        '<button type="button" data-copies="best-command">copy</button></div>'
    )


def _asset(name: str) -> str:
    return files("lightning_mgpu.sweep.report.html").joinpath(name).read_text(encoding="utf-8")
