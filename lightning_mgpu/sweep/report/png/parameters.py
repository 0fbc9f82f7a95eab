"""Figures of the searched values and their effect on the metric."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mgpu.sweep.report.axes import Axis, axis_of, jitter, metric_axis, shorten
from lightning_mgpu.sweep.report.importance import Importance
from lightning_mgpu.sweep.report.model import SweepHistory, Trial
from lightning_mgpu.sweep.report.png.style import (
    describe_x,
    describe_y,
    figure,
    plain,
    written,
)
from lightning_mgpu.sweep.report.views import BEST, COLOURS

_COLUMNS = 3


def importances(sweep: SweepHistory, importance: Importance | None) -> Figure | None:
    """A bar for each value's importance; `None` if it cannot be estimated."""
    if importance is None:
        return None
    labels = {d.name: axis_of(sweep, d).label for d in sweep.dimensions}
    names = list(reversed(importance.shares))
    shares = [importance.shares[name] for name in names]
    drawn = figure(1.3 + 0.32 * len(names), 8)
    axes = drawn.add_subplot()
    words = [written(shorten(labels[name], 28)) for name in names]
    bars = axes.barh(range(len(names)), shares, height=0.65, color=COLOURS["done"])
    axes.set_yticks(range(len(names)), words)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4, fontsize=9)
    plain(axes)
    axes.grid(False, axis="y")
    axes.set_xlim(0, max(max(shares) * 1.12, 0.1))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the metric's variance")
    axes.set_title(importance.method, fontsize=9.5, loc="left")
    return drawn


def scatter(sweep: SweepHistory) -> Figure | None:
    """The metric against each value; `None` without a trial that has a result."""
    found, axes_of = sweep.valued(), [axis_of(sweep, one) for one in sweep.dimensions]
    if not found or not axes_of:
        return None
    rows, columns = math.ceil(len(axes_of) / _COLUMNS), min(_COLUMNS, len(axes_of))
    drawn = figure(0.5 + 3 * rows)
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=True)
    best = sweep.best()
    for index, axes in enumerate(grid.flat):
        if index >= len(axes_of):
            axes.set_axis_off()
            continue
        axis = axes_of[index]
        plain(axes)
        for status in COLOURS:
            members = [(t, v) for t, v in found if t.status == status and t is not best]
            marker = "x" if status == "stopped" else "o"
            _points(axes, axis, members, status, {"color": COLOURS[status], "marker": marker})
        look = {"color": BEST, "marker": "*", "s": 170, "zorder": 3}
        _points(axes, axis, [(t, v) for t, v in found if t is best], "best", look)
        describe_x(axes, axis)
        describe_y(axes, metric_axis(sweep))
        if index % columns:
            axes.set_ylabel("")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False)
    return drawn


def _points(
    axes: Axes, axis: Axis, members: list[tuple[Trial, float]], name: str, look: dict[str, Any]
) -> None:
    members = [(trial, value) for trial, value in members if axis.name in trial.params]
    if members:
        apart = 0 if name == "best" else 1
        x = [axis.place(t.params[axis.name]) + apart * jitter(axis, t) for t, _ in members]
        y = [value for _, value in members]
        axes.scatter(x, y, label=name, **{"s": 30, "alpha": 0.8, **look})
