"""How the trial of this process reports.

Imports nothing of Lightning: the trial decides which of its packages it uses.
"""

import difflib
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_plugins.ray_tune_sweeper import _lightning

log = logging.getLogger(__name__)

FOLDS = "folds"
"""Kind of the warning that a job fits several times."""

_FOLDS = (
    "A trial calls `fit` several times, as for cross-validation, and one run cannot be compared"
    " with another. So from here on trials report at their end alone, and none is stopped early."
    " What the job returns counts, if that is a number or names the metric; else the last `fit`"
    " does."
)


class NotFiniteError(ArithmeticError):
    """The metric of a trial is NaN or infinite."""


@dataclass
class Reporting:
    """How the trial of this process reports.

    Attributes:
        send: Takes metrics and perhaps the directory of a checkpoint; ends the trial with
            `SystemExit` if the scheduler says so.
        metrics: What the sweep optimises; nothing if that is what the job returns.
        saves: Whether each report comes with a checkpoint.
        restore_from: The directory of a checkpoint from which the first `fit` goes on.
        strategy: The class of ours that the job's config names at `strategy`, if it does.
        directory: The job's output directory, where all its files belong.
        notify: Takes the kind and the text of a warning that the user of the sweep should see.
        logged: The latest value of each metric that was logged, by `fit`, `validate` or `test`.
        best_checkpoint: Where it lies, as it is reported.
        sent: How many reports there were.
        stopped: Whether the scheduler has ended the trial.
        has_folds: Whether the jobs of this sweep fit several times, so that nothing is reported
            before the end.
        held: What the latest `fit` would have reported, in order.
        epoch: The latest one that was trained.
        warned: Kinds of warnings that were given.
    """

    send: Callable[[dict[str, Any], Path | None], None]
    metrics: tuple[str, ...]
    every_n_epochs: int = 1
    saves: bool = False
    restore_from: Path | None = None
    strategy: str | None = None
    directory: Path | None = None
    notify: Callable[[str, str], None] | None = None
    logged: dict[str, float] = field(default_factory=dict)
    best_checkpoint: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    stopped: bool = False
    has_folds: bool = False
    held: list[dict[str, Any]] = field(default_factory=list)
    epoch: int | None = None
    warned: set[str] = field(default_factory=set)


_current: Reporting | None = None


def begin(reporting: Reporting, factory: Callable[[str], list[Any]]) -> None:
    """A trial starts in this process.

    Args:
        reporting: How it reports.
        factory: Makes the callbacks for a new Trainer, which is of the namespace of that name.
    """
    global _current
    _current = reporting
    _lightning.factory = factory


def end() -> None:
    """The trial is over."""
    global _current
    _current = None
    _lightning.factory = None


def current() -> Reporting | None:
    """How the trial of this process reports; `None` if it runs in another one, or none does."""
    return _current


def is_stopped() -> bool:
    """Whether the trial of this process has been told to end."""
    return _current is not None and _current.stopped


def deliver(metrics: dict[str, Any], directory: Path | None) -> bool:
    """Report, in the process of the trial; whether the trial is to end."""
    if _current is None or _current.stopped:
        return False
    if _current.has_folds:
        _current.held.append(metrics)
        return False
    _current.sent += 1
    try:
        _current.send(metrics, directory)
    except SystemExit:
        _current.stopped = True
    return _current.stopped


def deliver_files(metrics: dict[str, Any], files: dict[str, bytes]) -> bool:
    """Report a checkpoint that was made on another machine, or may have been."""
    with tempfile.TemporaryDirectory(prefix="trial-") as directory:
        for name, data in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return deliver(metrics, Path(directory))


def note_fit(epoch: int) -> None:
    """A `fit` starts to train at an epoch: one that has been trained already is another run's."""
    if _current is None or _current.epoch is None or epoch > _current.epoch:
        return
    _current.held.clear()
    if _current.metrics:
        _current.has_folds = True
        _warn(FOLDS, _FOLDS)


def note(
    logged: dict[str, float], best_checkpoint: dict[str, str], epoch: int | None = None
) -> None:
    """Keep in mind what has been logged so far, and where the best checkpoint lies."""
    if _current is not None:
        _current.logged |= logged
        _current.epoch = _current.epoch if epoch is None else epoch
        _current.best_checkpoint |= best_checkpoint


def warn_of_missing() -> None:
    """Say early which metrics the trial has not logged yet, though it has been validated."""
    if _current is None:
        return
    names = set(_current.metrics) - _current.logged.keys()
    words = missing(names, _current.logged, "has not been logged by the first validation")
    text = f"{words} The first trial that ends without it ends the sweep."
    _warn("metric", text)


def warn_of_places(places: Mapping[str, list[str]]) -> None:
    """Say which files of the trial, by kind, do not go to its directory.

    Args:
        places: Directories where Lightning writes logs and checkpoints.
    """
    if _current is None or _current.directory is None:
        return
    home = _current.directory.resolve()
    outside = [
        f"{kind} in {place}"
        for kind, found in places.items()
        for place in found
        if not Path(place).resolve().is_relative_to(home)
    ]
    if outside:
        _warn(
            "places",
            f"A trial writes outside of its directory {home}: {', '.join(outside)}. Trials that run"
            " at the same time may write over one another's files there. Give the Trainer"
            " default_root_dir=${hydra:runtime.output_dir}, and its loggers a directory in there.",
        )


def warn_of_strategy(kind: str) -> None:
    """Say that the job's Trainer has a strategy of that kind, and not the one in the config."""
    assert _current is not None
    _warn(
        "strategy",
        f"The config has strategy._target_={_current.strategy}, but the application's Trainer"
        f" trains with {kind}: it does not read `cfg.strategy`. Where `cfg.trainer` has the"
        " Trainer's arguments, write +strategy@trainer.strategy=... instead of +strategy=....",
    )


def _warn(kind: str, text: str) -> None:
    """Warn once of each kind, here and in the sweep's own process."""
    if _current is None or kind in _current.warned:
        return
    _current.warned.add(kind)
    log.warning("%s", text)
    if _current.notify is not None:
        _current.notify(kind, text)


def missing(names: Collection[str], logged: Collection[str], how: str = "was never logged") -> str:
    """Sentence on metrics that were not logged, and on what was."""
    words = f"hydra.sweeper.metric={','.join(sorted(names))} {how}; logged were:"
    words += f" {', '.join(sorted(logged)) or 'nothing'}."
    near = [n for name in sorted(names) for n in _near(name, logged)]
    return f"{words} Did you mean {' and '.join(near)}?" if near else words


def _near(name: str, logged: Collection[str]) -> list[str]:
    of_loaders = sorted(n for n in logged if n.startswith(f"{name}/dataloader_idx_"))
    return of_loaders[:1] or difflib.get_close_matches(name, logged, n=1)


def note_restored() -> None:
    """The checkpoint that the trial went on from is not to be used again."""
    if _current is not None:
        _current.restore_from = None
