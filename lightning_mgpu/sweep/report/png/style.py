"""Style of matplotlib's figures."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_mgpu.sweep.report.axes import Axis, shorten

WIDTH = 11.0


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure; without `pyplot`, which would choose a backend for the whole process."""
    return Figure((width, height), layout="constrained")


def plain(axes: Axes) -> None:
    """Remove spines and draw a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)


def describe_x(axes: Axes, axis: Axis) -> None:
    """Set name (on top, since marks may be long), scale and ticks of the horizontal axis."""
    axes.set_title(written(shorten(axis.label, 36)), fontsize=10)
    if axis.log:
        axes.set_xscale("log")
    if marks := axis.marks():
        places, words = [at for at, _ in marks], [written(word) for _, word in marks]
        is_slanted = sum(map(len, words)) > 36 and axis.categories is not None
        axes.set_xticks(
            places,
            words,
            rotation=35 if is_slanted else 0,
            ha="right" if is_slanted else "center",
            rotation_mode="anchor",
        )
        axes.xaxis.set_minor_locator(NullLocator())
    if axis.limits is not None:
        axes.set_xlim(*axis.limits)


def describe_y(axes: Axes, axis: Axis) -> None:
    """Set name, scale and ticks of the vertical axis."""
    axes.set_ylabel(written(shorten(axis.label, 40)))
    if axis.log:
        axes.set_yscale("log")
        axes.set_yticks([at for at, _ in axis.ticks], [words for _, words in axis.ticks])
        axes.yaxis.set_minor_locator(NullLocator())


def written(words: str) -> str:
    """Escape dollar signs, which matplotlib takes for formulas."""
    return words.replace("$", r"\$")
