"""Draw a Gantt chart as PNG with matplotlib."""

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mgpu.timeline.gantt import KINDS, TEXT, Bar, Chart

_WIDTH, _DPI = 12.0, 110
# How much of the width the lanes have, and what a digit takes, in inches.
_LANES, _DIGIT = 0.9, 0.075


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart to a PNG file."""
    # Without `pyplot`, which would choose a backend for the whole process.
    figure = Figure((_WIDTH, 1.6 + 0.55 * len(chart.stages)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    lanes = range(len(chart.stages))
    axes.barh(lanes, chart.milliseconds, height=0.8, color="#ececec")
    for kind in KINDS:
        _bars(axes, chart, kind)
    _numbers(axes, chart)
    axes.set_yticks(lanes, chart.stages)
    axes.invert_yaxis()
    axes.set_xlim(0, chart.milliseconds)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("\n".join(chart.title), fontsize=11, loc="left", linespacing=1.4)
    figure.legend(loc="outside lower right", ncols=len(KINDS), frameon=False)
    figure.savefig(path)


def _bars(axes: Axes, chart: Chart, kind: str) -> None:
    bars = [bar for bar in chart.bars if bar.kind == kind]
    if bars:
        axes.barh(
            [bar.stage for bar in bars],
            [bar.length for bar in bars],
            left=[bar.start for bar in bars],
            height=0.8,
            color=KINDS[kind],
            edgecolor="white",
            # In points; narrow bars would be all edge.
            linewidth=min(0.8, 5 * median(_inches(bar, chart) for bar in bars)),
            label=kind,
        )


def _numbers(axes: Axes, chart: Chart) -> None:
    """Write micro-batch numbers into the bars that are wide enough."""
    digits = max(len(str(bar.chunk)) for bar in chart.bars)
    for bar in chart.bars:
        if _inches(bar, chart) > _DIGIT * (digits + 0.5):
            axes.text(
                bar.start + bar.length / 2,
                bar.stage,
                str(bar.chunk),
                ha="center",
                va="center",
                fontsize=8.5,
                color=TEXT[bar.kind],
            )


def _inches(bar: Bar, chart: Chart) -> float:
    return bar.length / chart.milliseconds * _WIDTH * _LANES
