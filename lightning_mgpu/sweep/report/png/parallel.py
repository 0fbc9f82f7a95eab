"""Parallel coordinates."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mgpu.sweep.report.axes import Axis, axis_of, metric_axis, shorten
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.png.style import WIDTH, figure, written
from lightning_mgpu.sweep.report.views import RANKS, common, goodness

Scale = Callable[[float], float]


def parallel(sweep: SweepHistory) -> Figure | None:
    """A line for each trial through its values to the metric; `None` with fewer than two."""
    found, metric = sweep.valued(), metric_axis(sweep)
    searched = common(sweep)
    if len(found) < 2 or not searched:
        return None
    results = [metric.linear(value) for _, value in found]
    columns = [
        (axis, [axis.linear(trial.params[axis.name]) for trial, _ in found])
        for axis in (axis_of(sweep, dimension) for dimension in searched)
    ]
    columns.append((metric, results))
    scales = [_scale(axis, column) for axis, column in columns]
    drawn = figure(4.8, max(WIDTH, 1.25 * len(columns)))
    axes = drawn.add_subplot()
    good, limits = goodness(sweep, results)
    palette = ScalarMappable(
        Normalize(*limits), LinearSegmentedColormap.from_list("ranks", list(RANKS))
    )
    colours = palette.to_rgba(np.asarray(good))
    # The best are drawn last.
    for number in sorted(range(len(found)), key=good.__getitem__):
        heights = [scale(one[number]) for scale, (_, one) in zip(scales, columns, strict=True)]
        axes.plot(range(len(columns)), heights, color=colours[number], linewidth=1.4, alpha=0.8)
    for place, ((axis, column), scale) in enumerate(zip(columns, scales, strict=True)):
        axes.axvline(place, color="#5b6470", linewidth=1, zorder=3)
        _marks(axes, place, axis, column, scale)
    _names(axes, [axis.label for axis, _ in columns])
    return drawn


def _scale(axis: Axis, column: list[float]) -> Scale:
    """Scale from values to heights between 0 and 1."""
    low, high = min(column), max(column)
    if axis.categories is not None:
        low, high = -0.3, len(axis.categories) - 0.7
    if low == high:
        return lambda value: 0.5
    return lambda value: (value - low) / (high - low)


def _marks(axes: Axes, place: int, axis: Axis, column: list[float], scale: Scale) -> None:
    """Draw numbers and names along an axis."""
    if axis.log or axis.categories is not None:
        marks = [(axis.linear(at) if axis.log else at, words) for at, words in axis.marks()]
    else:
        locator = MaxNLocator(6, integer=all(float(value).is_integer() for value in column))
        marks = [(at, f"{at:g}") for at in locator.tick_values(min(column), max(column))]
    for at, words in marks:
        if -0.02 <= scale(at) <= 1.02:
            axes.annotate(
                written(shorten(words, 13)),
                (place, scale(at)),
                (5, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                zorder=4,
                bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.7, "linewidth": 0},
            )


def _names(axes: Axes, labels: list[str]) -> None:
    is_crowded = len(labels) > 7
    axes.set_xticks(
        range(len(labels)),
        [written(shorten(label)) for label in labels],
        rotation=20 if is_crowded else 0,
        ha="left" if is_crowded else "center",
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.2, len(labels) - 0.6)
