"""Bar chart: epochs trained and epochs saved by early stopping, per trial."""

from matplotlib.figure import Figure

from lightning_mgpu.sweep.report.model import STATUSES, SweepHistory
from lightning_mgpu.sweep.report.png.style import figure, plain
from lightning_mgpu.sweep.report.views import COLOURS, longest_first, saving


def epochs(sweep: SweepHistory) -> Figure | None:
    """Draw epochs trained and saved per trial; `None` without epochs to show."""
    if not sweep.has_epochs or sweep.longest <= 1:
        return None
    trials = longest_first(sweep)
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
