"""Checkpoints on storage that all workers share: a directory or a URI."""

import logging
import os
import shutil
import time
import uuid
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from pyarrow import ArrowInvalid, ArrowNotImplementedError
from pyarrow.fs import (
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
)
from typing_extensions import override

from lightning_mgpu.errors import one_line
from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.ray.epoch_checkpoint import CallsRanks, CheckpointKeeper
from lightning_mgpu.ray.worker import call_on_driver

log = logging.getLogger(__name__)

_POINTER = "latest"
_MARK = ".shared"


def absolute(path: str | os.PathLike[str]) -> str:
    """Make a path absolute; a URI stays as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


@dataclass(frozen=True)
class Directory:
    """A directory on some file system; every process opens it for itself.

    Attributes:
        path: Absolute, or a URI that pyarrow or else fsspec knows.
        has_some: Whether a checkpoint is known to be there.
    """

    path: str
    has_some: bool = False

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Replace the last checkpoint, or leave it unchanged on failure."""
        system, path = self._open()
        system.create_dir(path, recursive=True)
        name = f"epoch={checkpoint['epoch']}-step={checkpoint['global_step']}.ckpt"
        with system.open_output_stream(f"{path}/{name}") as file:
            torch.save(checkpoint, file)
        # Stores of objects cannot rename a large one at once, so a small one says which counts.
        with system.open_output_stream(f"{path}/{_POINTER}.part") as file:
            file.write(name.encode())
        system.move(f"{path}/{_POINTER}.part", f"{path}/{_POINTER}")
        for info in system.get_file_info(FileSelector(path)):
            if info.base_name.endswith(".ckpt") and info.base_name != name:
                system.delete_file(info.path)

    def copy_to(self, file: IO[bytes]) -> bool:
        """Write the latest checkpoint to a file; return whether there is one.

        Raises:
            ValueError: It is known to be there and cannot be found from here.
        """
        system, path = self._open()
        if system.get_file_info(f"{path}/{_POINTER}").type == FileType.NotFound:
            if self.has_some:
                raise ValueError(
                    f"`storage_path`: the last checkpoint in {self.path} is not visible on the"
                    " node where training is to resume. Use storage that all nodes share."
                )
            return False
        with system.open_input_stream(f"{path}/{_POINTER}") as pointer:
            name = pointer.read().decode()
        with system.open_input_stream(f"{path}/{name}") as checkpoint:
            shutil.copyfileobj(checkpoint, file, 1 << 22)
        return True

    def mark(self) -> str | None:
        """Write a marker file beside the directory; return the error message, if any."""
        try:
            system, path = self._open()
            system.create_dir(path.rpartition("/")[0], recursive=True)
            with system.open_output_stream(path + _MARK) as file:
                file.write(b"seen")
        except (OSError, ValueError) as error:
            return one_line(error)
        return None

    def is_marked(self) -> bool:
        """Return whether the marker file is visible to this process."""
        system, path = self._open()
        return bool(system.get_file_info(path + _MARK).type == FileType.File)

    def unmark(self) -> None:
        """Remove the marker file."""
        system, path = self._open()
        system.delete_file(path + _MARK)

    def remove(self) -> None:
        """Remove the directory with its contents, if it exists."""
        system, path = self._open()
        if system.get_file_info(path).type != FileType.NotFound:
            system.delete_dir(path)

    def _open(self) -> tuple[Any, str]:
        if "://" not in self.path:
            return LocalFileSystem(), self.path
        try:
            system, path = FileSystem.from_uri(self.path)
        except (ArrowInvalid, ArrowNotImplementedError) as error:
            if "?" in self.path:  # options are Arrow's; fsspec would take them for a name
                raise ValueError(str(error)) from error
            import fsspec

            try:  # a scheme that only fsspec may know
                system, path = fsspec.core.url_to_fs(self.path)
            except (ImportError, ValueError) as missing:
                raise ValueError(f"{error}, and {missing}") from error
            system = PyFileSystem(FSSpecHandler(system))
        return system, path


class StorageKeeper(CheckpointKeeper):
    """Make rank 0 write checkpoints to storage, where they stay if training fails.

    Args:
        path: The strategy's `storage_path`; each training has a directory in it.
    """

    def __init__(self, path: str) -> None:
        self._asked = path
        own = f"fit-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        # A URI may end with options, as `s3://bucket/runs?endpoint_override=...`.
        base, mark, options = path.partition("?") if "://" in path else (path, "", "")
        self._directory = Directory(f"{base.rstrip('/')}/{own}{mark}{options}")
        self.has_some = False
        self.save = _Write(self._directory)

    @override
    def latest(self) -> Directory | None:
        # The word of the first one may have been lost with the worker that wrote it.
        return replace(self._directory, has_some=self.has_some)

    @override
    def check(self, workers: CallsRanks) -> None:
        """Refuse storage that rank 0 cannot write to, or that nodes do not share.

        Raises:
            ValueError: Says which.
        """
        problem = workers.call(self._directory.mark, ranks=(0,))[0]
        if problem is not None:
            raise ValueError(
                f"`storage_path={self._asked!r}`: rank 0 cannot write there: {problem}"
            )
        seen = workers.call(self._directory.is_marked)
        workers.call(self._directory.unmark, ranks=(0,))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise ValueError(
                f"`storage_path={self._asked!r}`: files that rank 0 writes there are not"
                f" visible to rank {blind[0]} on another node, so training could not resume if"
                " rank 0's node were lost. Use storage that all nodes share (a network mount,"
                " `s3://...`), or remove `storage_path`: the state then comes to this process"
                " instead."
            )

    @override
    def finish(self, workers: CallsRanks) -> None:
        self.has_some = False
        try:
            workers.call(self._directory.remove, ranks=(0,))
        except (OSError, WorkerDiedError) as error:  # the result is here; it is worth more
            log.warning("%s could not be removed: %s", self._directory.path, error)

    @override
    def __enter__(self) -> "StorageKeeper":
        _all[self._directory.path] = self
        return self

    @override
    def __exit__(self, *_: Any) -> None:
        del _all[self._directory.path]
        if self.has_some:
            log.warning(
                "The state at the end of the last complete epoch is the checkpoint in %s."
                " Resume with `trainer.fit(..., ckpt_path=...)`.",
                self._directory.path,
            )


@dataclass(frozen=True)
class _Write:
    directory: Directory

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.directory.write(checkpoint)
        call_on_driver(_note, self.directory.path)


_all: dict[str, StorageKeeper] = {}


def _note(path: str) -> None:
    _all[path].has_some = True
