"""Figures of the searched values and their effect on the metric."""

import math
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lightning_mgpu.sweep.report.axes import (
    Axis,
    axis_of,
    jitter,
    log_ticks,
    metric_axis,
    shorten,
    text,
)
from lightning_mgpu.sweep.report.html.style import about, described, styled
from lightning_mgpu.sweep.report.importance import Importance
from lightning_mgpu.sweep.report.model import STATUSES, SweepHistory, Trial
from lightning_mgpu.sweep.report.views import BEST, COLOURS, RANKS, common, goodness

_COLUMNS = 3


def parallel(sweep: SweepHistory) -> go.Figure | None:
    """A line for each trial through its values to the metric; `None` with fewer than two."""
    axes = [axis_of(sweep, dimension) for dimension in common(sweep)]
    found = sweep.valued()
    if len(found) < 2 or not axes:
        return None
    metric = metric_axis(sweep)
    values = [metric.linear(value) for _, value in found]
    columns = [_column(axis, [trial.params[axis.name] for trial, _ in found]) for axis in axes]
    columns.append(_column(metric, [value for _, value in found]))
    colours, (low, high) = goodness(sweep, values)  # plotly draws what has the largest on top
    figure = go.Figure(
        go.Parcoords(
            dimensions=columns,
            line={
                "color": colours,
                "colorscale": [[at / (len(RANKS) - 1), one] for at, one in enumerate(RANKS)],
                "cmin": low,
                "cmax": high,
            },
            labelfont={"size": 12},
            tickfont={"size": 11},
            rangefont={"size": 1, "color": "rgba(0,0,0,0)"},
            unselected={"line": {"color": "#d5d9df", "opacity": 0.25}},
        )
    )
    styled(figure, 460, margin={"l": 80, "r": 90, "t": 76, "b": 24})
    return figure


def _column(axis: Axis, values: list[Any]) -> dict[str, Any]:
    places = [axis.linear(value) for value in values]
    column: dict[str, Any] = {"label": escape(shorten(axis.label, 17)), "values": places}
    if axis.categories is not None:
        column["range"] = [-0.3, len(axis.categories) - 0.7]
    if axis.log:
        # Trials may cover a part of the axis only, and plotly draws a mark wherever one is given.
        margin = 0.02 * (max(places) - min(places)) or 0.1
        low, high = min(places) - margin, max(places) + margin
        ticks = [(math.log10(at), words) for at, words in log_ticks(10**low, 10**high)]
        ticks = [(at, words) for at, words in ticks if low <= at <= high]
        if len(ticks) < 2:
            ticks = [(at, text(10**at)) for at in sorted({min(places), max(places)})]
        column |= {"range": [low, high], "tickvals": [at for at, _ in ticks]}
        column["ticktext"] = [words for _, words in ticks]
    elif marks := axis.marks():
        column["tickvals"] = [at for at, _ in marks]
        column["ticktext"] = [escape(shorten(words, 13)) for _, words in marks]
    return column


def importances(sweep: SweepHistory, importance: Importance | None) -> go.Figure | None:
    """A bar for each value's importance; `None` if it cannot be estimated."""
    if importance is None:
        return None
    axes = {dimension.name: axis_of(sweep, dimension) for dimension in sweep.dimensions}
    names = list(reversed(importance.shares))
    figure = go.Figure(
        go.Bar(
            orientation="h",
            x=[importance.shares[name] for name in names],
            y=[escape(shorten(axes[name].label, 28)) for name in names],
            text=[f"{importance.shares[name]:.0%}" for name in names],
            textposition="outside",
            cliponaxis=False,
            marker={"color": COLOURS["done"]},
            customdata=[escape(name) for name in names],
            hovertemplate="%{customdata}: %{x:.1%}<extra></extra>",
        )
    )
    styled(figure, 110 + 30 * len(names), bargap=0.35, showlegend=False)
    top = max(max(importance.shares.values()) * 1.12, 0.1)
    title = {"text": "share of the metric's variance"}
    figure.update_xaxes(title=title, tickformat=".0%", range=[0, min(top, 1.08)])
    figure.update_yaxes(showgrid=False, ticksuffix="  ")
    return figure


def scatter(sweep: SweepHistory) -> go.Figure | None:
    """The metric against each value; `None` without a trial that has a result."""
    found, axes = sweep.valued(), [axis_of(sweep, dimension) for dimension in sweep.dimensions]
    if not found or not axes:
        return None
    metric, best = metric_axis(sweep), sweep.best()
    rows, columns = math.ceil(len(axes) / _COLUMNS), min(_COLUMNS, len(axes))
    figure = make_subplots(
        rows,
        columns,
        shared_yaxes=True,
        horizontal_spacing=0.035,
        vertical_spacing=min(0.4, 105 / (300 * rows)),
        subplot_titles=[escape(shorten(axis.label, 36)) for axis in axes],
    )
    for index, axis in enumerate(axes):
        where = {"row": index // columns + 1, "col": index % columns + 1}
        for status in (*STATUSES, "best"):
            members = [(t, v) for t, v in found if ("best" if t is best else t.status) == status]
            _points(figure, sweep, axis, members, status, index == 0, where)
        figure.update_xaxes({**described(axis, tickangle=_angle(axis)), "title": ""}, **where)
        title = {"text": described(metric)["title"]["text"] if where["col"] == 1 else ""}
        figure.update_yaxes({**described(metric), "title": title}, **where)
    figure.update_annotations(font_size=14)
    styled(figure, 90 + 300 * rows, margin={"l": 64, "r": 20, "t": 72, "b": 70})
    # Above the names of the first row.
    return figure.update_layout(legend={"yref": "container", "y": 0.995, "yanchor": "top"})


def _points(
    figure: go.Figure,
    sweep: SweepHistory,
    axis: Axis,
    members: list[tuple[Trial, float]],
    name: str,
    is_first: bool,
    where: dict[str, int],
) -> None:
    members = [(trial, value) for trial, value in members if axis.name in trial.params]
    if not members:
        return
    is_best = name == "best"
    apart = 0 if is_best else 1
    marker = {"size": 7, "color": COLOURS.get(name, BEST), "opacity": 0.8}
    if is_best:
        marker |= {"size": 15, "symbol": "star", "opacity": 1}
    elif name == "stopped":
        marker |= {"symbol": "x-thin-open", "line": {"width": 2, "color": COLOURS[name]}}
    figure.add_scatter(
        x=[axis.place(t.params[axis.name]) + apart * jitter(axis, t) for t, _ in members],
        y=[value for _, value in members],
        text=[about(sweep, trial) for trial, _ in members],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=is_first,
        marker=marker,
        hovertemplate="%{text}<extra></extra>",
        **where,
    )


def _angle(axis: Axis) -> int:
    """Angle of labels: slanted if they are long or many."""
    words = [shorten(name) for name in axis.categories or ()]
    return -35 if sum(map(len, words)) > 36 else 0
