"""Views of a sweep common to all drawings."""

from dataclasses import dataclass

from lightning_mgpu.sweep.report.model import STATUSES, Dimension, SweepHistory, Trial

COLOURS = {
    "done": "#2f6fa7",
    "stopped": "#f0a23c",
    "failed": "#c0392b",
    "unfinished": "#8a8f98",
    "paused": "#b9cfe3",
}
BEST = "#117a4b"
RANKS = ("#e4e8ed", "#a9c3da", "#4f88b8", "#1d4f7d", "#0a2540")
"""Colours of lines from the worst trial to the best, which stands out most on white."""


@dataclass(frozen=True)
class Curve:
    """A trial's metric over its epochs; in pieces where it was restored from earlier ones."""

    trial: Trial
    pieces: list[list[tuple[float, float]]]
    is_best: bool


def curves(sweep: SweepHistory) -> list[Curve]:
    """Curves of all trials, the best one last, so that it is on top."""
    best = sweep.best()
    found = []
    for trial in sweep.trials:
        pieces: list[list[tuple[float, float]]] = []
        for place, value in sweep.history(trial):
            if not pieces or place <= pieces[-1][-1][0]:
                pieces.append([])
            pieces[-1].append((place, value))
        if pieces:
            found.append(Curve(trial, pieces, trial is best))
    return sorted(found, key=lambda curve: curve.is_best)


def has_curves(sweep: SweepHistory) -> bool:
    """Return whether some trial has reported more than once."""
    return any(len(sweep.history(trial)) > 1 for trial in sweep.trials)


def best_so_far(sweep: SweepHistory) -> list[tuple[int, float]]:
    """Best value so far at each trial number."""
    better = max if sweep.mode == "max" else min
    found: list[tuple[int, float]] = []
    for trial, value in sweep.valued():
        found.append((trial.number, better(value, found[-1][1]) if found else value))
    return found


def counts(sweep: SweepHistory) -> dict[str, int]:
    """Number of trials by status."""
    found = {status: sum(t.status == status for t in sweep.trials) for status in STATUSES}
    return {status: number for status, number in found.items() if number}


def longest_first(sweep: SweepHistory) -> list[Trial]:
    """Trials with reports, those with most epochs first."""
    reported = [trial for trial in sweep.trials if trial.reports]
    return sorted(reported, key=lambda trial: (-sweep.epochs(trial), trial.number))


def saving(sweep: SweepHistory) -> str:
    """Describe the epochs saved by early stopping."""
    trained = sum(map(sweep.epochs, sweep.trials))
    saved = sum(map(sweep.saved, sweep.trials))
    if not saved:
        return f"{trained:.5g} epochs trained; no trial was stopped before the others."
    share = saved / (trained + saved)
    return (
        f"{saved:.5g} of {trained + saved:.5g} epochs were saved ({share:.0%}): what the stopped"
        f" trials would have trained, had they gone on as long as the longest"
        f" ({sweep.longest:.4g} epochs)."
    )


def goodness(sweep: SweepHistory, values: list[float]) -> tuple[list[float], tuple[float, float]]:
    """Values of the metric such that more is better, and the limits of their colours.

    The outermost twentieths of them are beyond the limits, or one bad trial would make all others
    look the same.
    """
    signed = [value if sweep.mode == "max" else -value for value in values]
    ordered, cut = sorted(signed), len(signed) // 20
    low, high = ordered[cut], ordered[-1 - cut]
    return signed, (low, high) if high > low else (low - 1, low)


def common(sweep: SweepHistory) -> list[Dimension]:
    """Searched values that all trials with a result have: none that depend on others."""
    found = [trial for trial, _ in sweep.valued()]
    return [one for one in sweep.dimensions if all(one.name in trial.params for trial in found)]
