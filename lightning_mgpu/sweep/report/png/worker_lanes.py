"""Trials on the workers that ran them."""

from matplotlib.figure import Figure

from lightning_mgpu.sweep.report.lanes import time_unit, timeline
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.png.style import WIDTH, figure, written
from lightning_mgpu.sweep.report.views import COLOURS

_DIGIT = 0.085  # what one takes, in inches
_LANES = 0.9  # how much of the width the lanes have


def workers(sweep: SweepHistory) -> Figure | None:
    """A bar for each stretch of a trial; `None` if none has started."""
    found = timeline(sweep)
    if not found.bars:
        return None
    unit, seconds = time_unit(found.end)
    drawn = figure(1.4 + 0.36 * len(found.lanes))
    axes = drawn.add_subplot()
    inch = WIDTH * _LANES / (found.end or 1)
    for outcome, colour in COLOURS.items():
        bars = [bar for bar in found.bars if bar.outcome == outcome]
        if bars:
            axes.barh(
                [bar.lane for bar in bars],
                [(bar.end - bar.start) / seconds for bar in bars],
                left=[bar.start / seconds for bar in bars],
                height=0.82,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=outcome,
            )
    for bar in found.bars:
        words = str(bar.trial.number)
        if (bar.end - bar.start) * inch > _DIGIT * (len(words) + 0.5):
            middle = (bar.start + bar.end) / 2 / seconds
            ink = "black" if bar.outcome in ("stopped", "paused") else "white"
            axes.text(middle, bar.lane, words, ha="center", va="center", fontsize=8, color=ink)
    for moment in found.resumed:
        axes.axvline(moment / seconds, linestyle=":", color="#5b6470")
    axes.set_yticks(range(len(found.lanes)), [written(lane) for lane in found.lanes])
    axes.invert_yaxis()
    axes.set_xlim(0, (found.end or 1) / seconds * 1.005)
    axes.set_xlabel(unit + (", dotted where the sweep was resumed" if found.resumed else ""))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    drawn.legend(loc="outside upper left", ncols=5, frameon=False)
    return drawn
