"""Warnings of trials for the user of a sweep, through files in its directory."""

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ray.tune import Callback
from typing_extensions import Self, override

log = logging.getLogger(__name__)

_DIRECTORY = ".notices"


def notify(sweep_dir: Path, kind: str, text: str) -> None:
    """Leave a warning for the sweep's own process, the first of its kind in the sweep.

    Args:
        sweep_dir: The sweep's directory.
        kind: Name of a file.
        text: What to log.
    """
    directory = sweep_dir / _DIRECTORY
    with contextlib.suppress(OSError):  # it is in the trial's log as well
        directory.mkdir(exist_ok=True)
        unfinished = directory / f"{kind}.{os.getpid()}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(directory / kind)


def is_known(sweep_dir: Path, kind: str) -> bool:
    """Return whether a trial has left a warning of that kind."""
    return (sweep_dir / _DIRECTORY / kind).exists()


class Notices(Callback):
    """Log the warnings that trials leave, while the block lasts.

    Args:
        sweep_dir: The sweep's directory.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self._directory = sweep_dir / _DIRECTORY
        self._kinds: set[str] = set()

    def __enter__(self) -> Self:
        self._clear()  # those of a driver that was killed
        return self

    def __exit__(self, *_: object) -> None:
        self._log()
        self._clear()

    @override
    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._log()

    def _log(self) -> None:
        """Log what has come since the last time, one warning of each kind in all."""
        with contextlib.suppress(OSError):
            for path in sorted(self._directory.glob("*")):
                if path.suffix != ".tmp" and path.name not in self._kinds:
                    self._kinds.add(path.name)
                    log.warning("%s", path.read_text(encoding="utf-8"))

    def _clear(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
