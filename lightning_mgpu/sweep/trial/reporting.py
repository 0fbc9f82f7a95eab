"""How the trial of this process reports.

Imports nothing of Lightning: the trial decides which of its packages it uses.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_plugins.ray_tune_sweeper import _lightning


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
        seen: Names of all metrics that were logged.
        best_checkpoint: Where it lies, as it is reported.
        sent: How many reports there were.
        stopped: Whether the scheduler has ended the trial.
    """

    send: Callable[[dict[str, Any], Path | None], None]
    metrics: tuple[str, ...]
    every_n_epochs: int = 1
    saves: bool = False
    restore_from: Path | None = None
    seen: set[str] = field(default_factory=set)
    best_checkpoint: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    stopped: bool = False


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


def note(seen: set[str], best_checkpoint: dict[str, str]) -> None:
    """Keep in mind what has been logged so far, and where the best checkpoint lies."""
    if _current is not None:
        _current.seen |= seen
        _current.best_checkpoint |= best_checkpoint


def note_restored() -> None:
    """The checkpoint that the trial went on from is not to be used again."""
    if _current is not None:
        _current.restore_from = None
