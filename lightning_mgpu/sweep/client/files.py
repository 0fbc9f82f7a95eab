"""Files of a sweep on the cluster, served to a laptop."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from lightning_mgpu.sweep.report.reader import JOURNAL
from lightning_mgpu.sweep.store.results import RESULTS
from lightning_mgpu.sweep.store.tune_state import FOLDER

_CHUNK = 16 * 2**20  # bytes
_CHECKPOINT = ".ckpt"


class File(NamedTuple):
    """A file of the sweep: path below the sweep's directory, size in bytes and time."""

    path: str
    size: int
    mtime_ns: int


class SweepFiles:
    """Files to download of a sweep that starts in a directory.

    Args:
        place: The directory.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._journal_before = self._journal_size()

    def listed(self) -> list[File]:
        """All files, and of the checkpoints only the best.

        None, if the sweep was refused: what lies there is another's.
        """
        if self._journal_size() == self._journal_before:
            return []
        return list(_files(self.place, _best_checkpoints(self.place / RESULTS)))

    def read(self, path: str, offset: int) -> bytes:
        """Read a part of a file; empty at its end."""
        with (self.place / path).open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK)

    def _journal_size(self) -> int:
        path = self.place / JOURNAL
        return path.stat().st_size if path.exists() else 0


def _best_checkpoints(results: Path) -> list[Path]:
    if not results.exists():
        return []
    content = yaml.safe_load(results.read_text())
    found = [content.get("best_checkpoint")]
    found += [solution.get("checkpoint") for solution in content.get("solutions", ())]
    return [Path(path).resolve() for path in found if path is not None]


def _files(directory: Path, kept: list[Path]) -> Iterator[File]:
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if parts[0] == FOLDER:  # of use where the sweep can be resumed
            continue
        is_checkpoint = any(part.endswith(_CHECKPOINT) for part in parts)
        # (Lightning resolves links in the paths of its checkpoints.)
        if is_checkpoint and not any(path.resolve().is_relative_to(one) for one in kept):
            continue
        with suppress(OSError):  # somebody has just removed it
            if path.is_file():
                stat = path.stat()
                yield File(str(Path(*parts)), stat.st_size, stat.st_mtime_ns)
