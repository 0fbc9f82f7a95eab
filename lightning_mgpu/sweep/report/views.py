"""What is to be seen in a sweep, whoever draws it."""

from dataclasses import dataclass

from lightning_mgpu.sweep.report.model import STATUSES, Sweep, Trial

COLOURS = {
    "done": "#2f6fa7",
    "stopped": "#f0a23c",
    "failed": "#c0392b",
    "unfinished": "#8a8f98",
    "paused": "#b9cfe3",
}
BEST = "#117a4b"


@dataclass(frozen=True)
class Curve:
    """A trial's metric over its epochs; in pieces, where it went back in time."""

    trial: Trial
    pieces: list[list[tuple[float, float]]]
    is_best: bool


def curves(sweep: Sweep) -> list[Curve]:
    """Those of all trials, the best one last, so that it is on top."""
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


def has_curves(sweep: Sweep) -> bool:
    """Whether some trial has reported more than once; else there are results, and no curves."""
    return any(len(sweep.history(trial)) > 1 for trial in sweep.trials)


def best_so_far(sweep: Sweep) -> list[tuple[int, float]]:
    """By the trials' numbers, the best value up to each of them."""
    better = max if sweep.mode == "max" else min
    found: list[tuple[int, float]] = []
    for trial, value in sweep.valued():
        found.append((trial.number, better(value, found[-1][1]) if found else value))
    return found


def counts(sweep: Sweep) -> dict[str, int]:
    """How many trials have ended how."""
    found = {status: sum(t.status == status for t in sweep.trials) for status in STATUSES}
    return {status: number for status, number in found.items() if number}


def longest_first(sweep: Sweep) -> list[Trial]:
    """The trials that have reported, those with most epochs first."""
    reported = [trial for trial in sweep.trials if trial.reports]
    return sorted(reported, key=lambda trial: (-sweep.epochs(trial), trial.number))


def saving(sweep: Sweep) -> str:
    """In words what early stopping has saved."""
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


def complete(sweep: Sweep) -> list[tuple[Trial, float]]:
    """The trials that have a result and every value that was searched."""
    names = {dimension.name for dimension in sweep.dimensions}
    return [(trial, value) for trial, value in sweep.valued() if names <= trial.params.keys()]
