"""Learning curves."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mgpu.sweep.report.axes import metric_axis
from lightning_mgpu.sweep.report.model import STATUSES, SweepHistory
from lightning_mgpu.sweep.report.png.style import describe_y, figure, plain
from lightning_mgpu.sweep.report.views import (
    BEST,
    COLOURS,
    best_so_far,
    curves,
    has_curves,
)

_END = {"done": "o", "stopped": "x", "failed": "P", "unfinished": "."}


def learning_curves(sweep: SweepHistory) -> Figure | None:
    """The metric over epochs, or over trials if each has reported once; `None` without any."""
    found = curves(sweep)
    if not found:
        return None
    if not has_curves(sweep):
        return _results(sweep)
    drawn = figure(5.2)
    axes = drawn.add_subplot()
    opacity, named = max(0.3, 1 - len(found) / 60), set()
    for curve in sorted(found, key=lambda one: (one.is_best, STATUSES.index(one.trial.status))):
        status = curve.trial.status
        colour = BEST if curve.is_best else COLOURS[status]
        look: dict[str, Any] = {"color": colour, "alpha": 1 if curve.is_best else opacity}
        for piece in curve.pieces:
            axes.plot(*zip(*piece, strict=True), linewidth=2.8 if curve.is_best else 1.2, **look)
        label = f"best: trial {curve.trial.number}" if curve.is_best else status
        axes.plot(
            *curve.pieces[-1][-1],
            marker=_END[status],
            markersize=6,
            linestyle="",
            label=None if label in named else label,
            color=colour,
        )
        named.add(label)
    plain(axes)
    describe_y(axes, metric_axis(sweep))
    axes.set_xlabel("epoch" if sweep.has_epochs else "report")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if sweep.longest > 1:
        axes.set_xlim(left=0)
    drawn.legend(loc="outside upper left", ncols=5, frameon=False)
    return drawn


def _results(sweep: SweepHistory) -> Figure:
    drawn = figure(5.2)
    axes = drawn.add_subplot()
    for status in STATUSES:
        members = [curve.trial for curve in curves(sweep) if curve.trial.status == status]
        if members:
            axes.plot(
                [trial.number for trial in members],
                [sweep.history(trial)[-1][1] for trial in members],
                marker=_END[status],
                linestyle="",
                color=COLOURS[status],
                label=status,
            )
    if found := best_so_far(sweep):
        axes.step(*zip(*found, strict=True), where="post", color=BEST, label="best so far")
    plain(axes)
    describe_y(axes, metric_axis(sweep))
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.legend(loc="outside upper left", ncols=5, frameon=False)
    return drawn
