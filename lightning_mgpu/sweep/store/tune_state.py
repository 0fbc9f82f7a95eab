"""Consistent copy of Ray Tune's state, whenever the driver is killed."""

import contextlib
import logging
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from typing_extensions import override

from lightning_mgpu._compat.ray_tune import state_directory

log = logging.getLogger(__name__)

FOLDER = ".ray"
"""What is Ray Tune's own, in the directory of a sweep."""

STATE = "state.tar"
"""Copy of its state, in that folder."""

_MARKER = ".validate_storage_marker"
_CHECKPOINTS = "checkpoint_*"


class StateKeeper(Callback):
    """Keep copies of Ray's state of trials, searcher and scheduler.

    Ray writes its files at one place and copies them to its folder in the sweep's directory one by
    one. A driver that is killed meanwhile leaves a mixture there, with which Ray would start all
    over again.

    Args:
        directory: The sweep's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / FOLDER / STATE
        self._source: Path | None = None
        self._seen: list[tuple[str, int]] = []
        self._has_warned = False
        self._put_back: set[str] = set()

    def put_back(self) -> None:
        """Restore the copy in the directory from which Ray resumes."""
        if not self._path.exists():
            return
        with tarfile.open(self._path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None, "not a file"
                name = Path(member.name).name
                (self._path.parent / name).write_bytes(file.read())
                self._put_back.add(name)

    @override
    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if trials:
            self._source = state_directory(trials[0])
            self.take()

    def take(self) -> None:
        """Copy the state that Ray has written since the last time."""
        if self._source is None:
            return
        try:
            files = sorted(path for path in self._source.iterdir() if path.is_file())
            seen = [(path.name, path.stat().st_mtime_ns) for path in files]
            if seen != self._seen:
                self._write(files)
                self._seen = seen
        except OSError as error:  # a full disk, say
            if not self._has_warned:
                log.warning("%s cannot be written: %s", self._path, error)
            self._has_warned = True

    def clear(self) -> None:
        """Remove what Ray has left in its folder but for the copy, and checkpoints."""
        folder = self._path.parent
        with contextlib.suppress(OSError, tarfile.TarError):
            with tarfile.open(self._path) as archive:
                held = {Path(name).name for name in archive.getnames()}
            for name in (*held, *self._put_back, _MARKER):  # older than what the copy holds
                (folder / name).unlink(missing_ok=True)
            for place in folder.iterdir():
                if place.is_dir() and not any(place.glob(_CHECKPOINTS)):
                    shutil.rmtree(place)  # the reasons of failures are in the results

    def show_checkpoints(self, places: Mapping[int, Path]) -> None:
        """Link the checkpoints of trials that are kept in their directories, by number."""
        for number, place in places.items():
            for path in (self._path.parent / str(number)).glob(_CHECKPOINTS):
                with contextlib.suppress(OSError):  # it is there, or the file system has no links
                    place.joinpath(path.name).symlink_to(os.path.relpath(path, place))

    def _write(self, files: list[Path]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".new")
        with tarfile.open(unfinished, "w") as archive:
            for path in files:
                archive.add(path, path.name)
        os.replace(unfinished, self._path)
