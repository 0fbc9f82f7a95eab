"""Learning curves."""

import plotly.graph_objects as go

from lightning_mgpu.sweep.report.axes import metric_axis
from lightning_mgpu.sweep.report.html.style import about, described, styled
from lightning_mgpu.sweep.report.model import STATUSES, SweepHistory
from lightning_mgpu.sweep.report.views import (
    BEST,
    COLOURS,
    Curve,
    best_so_far,
    curves,
    has_curves,
)

_END = {
    "done": "circle",
    "stopped": "x-thin-open",
    "failed": "cross-thin-open",
    "unfinished": "circle-open",
}

_FEW = 12  # epochs, each of which has a mark


def learning_curves(sweep: SweepHistory) -> go.Figure | None:
    """The metric over epochs, or over trials if each has reported once; `None` without any."""
    found = curves(sweep)
    if not found:
        return None
    if not has_curves(sweep):
        return _results(sweep)
    figure = go.Figure()
    crowd = sum(not curve.is_best for curve in found)
    for status in STATUSES:
        members = [c for c in found if c.trial.status == status and not c.is_best]
        if members:
            _add(figure, sweep, members, status, COLOURS[status], 1.4, max(0.35, 1 - crowd / 80))
    for curve in found:
        if curve.is_best:
            name = f"best: trial {curve.trial.number}"
            _add(figure, sweep, [curve], name, BEST, 3, 1)
    styled(figure, 440, xaxis={"title": {"text": unit(sweep)}}, yaxis=described(metric_axis(sweep)))
    figure.update_xaxes(rangemode="tozero" if sweep.longest > 1 else "normal")
    if sweep.longest <= _FEW:
        figure.update_xaxes(dtick=1)
    return figure


def _results(sweep: SweepHistory) -> go.Figure:
    figure = go.Figure()
    for status in STATUSES:
        members = [curve.trial for curve in curves(sweep) if curve.trial.status == status]
        if members:
            figure.add_scatter(
                x=[trial.number for trial in members],
                y=[sweep.history(trial)[-1][1] for trial in members],
                text=[about(sweep, trial) for trial in members],
                name=status,
                mode="markers",
                marker={"size": 8, "color": COLOURS[status], "symbol": _END[status]},
                hovertemplate="%{text}<extra></extra>",
            )
    numbers, values = zip(*best_so_far(sweep), strict=True) if sweep.valued() else ((), ())
    line = {"color": BEST, "width": 2.5, "shape": "hv"}
    figure.add_scatter(x=numbers, y=values, name="best so far", mode="lines", line=line)
    return styled(
        figure, 440, xaxis={"title": {"text": "trial"}}, yaxis=described(metric_axis(sweep))
    )


def _add(
    figure: go.Figure,
    sweep: SweepHistory,
    members: list[Curve],
    name: str,
    colour: str,
    width: float,
    opacity: float,
) -> None:
    """Add related curves as one trace, so that the legend hides them together."""
    points = [point for curve in members for point in _points(sweep, curve)]
    x, y, texts, sizes = zip(*points, strict=True)
    status = members[0].trial.status
    figure.add_scatter(
        x=x,
        y=y,
        text=texts,
        name=name,
        mode="lines+markers",
        line={"color": _with_opacity(colour, opacity), "width": width},
        marker={
            "size": sizes,
            "sizemin": 0,
            "opacity": 1,
            "symbol": _END[status],
            "color": colour,
            "line": {"width": 1.5, "color": colour},
        },
        hovertemplate=f"%{{text}}<br>{unit(sweep)} %{{x:.4g}}: %{{y:.5g}}<extra></extra>",
    )


def _points(sweep: SweepHistory, curve: Curve) -> list[tuple[float | None, float | None, str, int]]:
    """Position, value, text and size of each mark; with a gap after each piece."""
    # All that is known of a trial is said at its end alone, or the page would be large.
    words = f"<b>trial {curve.trial.number}</b>, {curve.trial.status}"
    points: list[tuple[float | None, float | None, str, int]] = []
    for piece in curve.pieces:
        points += [(place, value, words, 0) for place, value in piece]
        points.append((None, None, "", 0))
    place, value, *_ = points[-2]
    points[-2] = (place, value, about(sweep, curve.trial), 8)
    return points


def _with_opacity(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:.2f})"


def unit(sweep: SweepHistory) -> str:
    """Unit of the curves' horizontal axis."""
    return "epoch" if sweep.has_epochs else "report"
