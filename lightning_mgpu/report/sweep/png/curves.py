"""Learning curves, and how many epochs each trial was given."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mgpu.report.sweep.axes import metric_axis
from lightning_mgpu.report.sweep.model import STATUSES, Sweep
from lightning_mgpu.report.sweep.png.style import describe_y, figure, plain
from lightning_mgpu.report.sweep.views import (
    BEST,
    COLOURS,
    best_so_far,
    curves,
    has_curves,
    saving,
)

__all__: list[str] = []

_END = {"done": "o", "stopped": "x", "failed": "P", "unfinished": "."}


def learning_curves(sweep: Sweep) -> Figure | None:
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


def _results(sweep: Sweep) -> Figure:
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


def epochs(sweep: Sweep) -> Figure | None:
    """What each trial was given, and what stopping it has saved; `None` with nothing to see."""
    trials = [trial for trial in sweep.trials if trial.reports]
    if not sweep.has_epochs or sweep.longest <= 1:
        return None
    trials.sort(key=lambda trial: (-sweep.epochs(trial), trial.number))
    drawn = figure(4)
    axes = drawn.add_subplot()
    places = range(len(trials))
    for status in STATUSES:
        members = [place for place in places if trials[place].status == status]
        if members:
            heights = [sweep.epochs(trials[place]) for place in members]
            label = f"trained, {status}"
            axes.bar(members, heights, width=0.85, color=COLOURS[status], label=label)
    cut = [place for place in places if sweep.saved(trials[place])]
    if cut:
        axes.bar(
            cut,
            [sweep.saved(trials[place]) for place in cut],
            bottom=[sweep.epochs(trials[place]) for place in cut],
            width=0.85,
            color="#f6f7f9",
            edgecolor="#c9ced6",
            linewidth=0,
            hatch="///",
            label="saved",
        )
    every = 1 if len(trials) <= 40 else len(trials) // 20
    axes.set_xticks(places[::every], [str(trial.number) for trial in trials[::every]])
    plain(axes)
    axes.grid(False, axis="x")
    axes.set_xlabel("trial, the longest first")
    axes.set_ylabel("epochs")
    axes.set_title(saving(sweep), fontsize=9.5, loc="left", wrap=True)
    drawn.legend(loc="outside upper left", ncols=5, frameon=False)
    return drawn
