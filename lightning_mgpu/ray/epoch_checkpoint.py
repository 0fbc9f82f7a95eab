"""Checkpoint after each epoch, from which training resumes when workers are lost."""

import io
import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_mgpu.ray.worker import SavedCheckpoint, call_on_driver

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Save = Callable[[dict[str, Any]], None]
"""Keeps a checkpoint in place of the last one; called on rank 0."""


class Autosave(Checkpoint):
    """Save a checkpoint after each epoch.

    A `Checkpoint`, since Lightning calls those after all other callbacks.

    Args:
        dump: Makes a checkpoint that rank 0 can save alone; called on all ranks.
        save: What to do with it.
    """

    def __init__(self, dump: "Callable[[Trainer], dict[str, Any]]", save: Save) -> None:
        self._dump, self._save = dump, save

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        checkpoint = self._dump(trainer)
        if trainer.is_global_zero:
            self._save(checkpoint)
            for logger in trainer.loggers:
                logger.save()  # whoever resumes from here does not log it again


class CallsRanks(Protocol):
    """Interface of a worker group between two runs."""

    def call(self, function: Callable[[], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Call a function on all of them, or on those of some ranks, and wait for the results."""


class CheckpointKeeper(ABC):
    """The driver's view of where one training's checkpoints are kept; removed with the block.

    Attributes:
        save: For the workers.
    """

    save: Save

    @abstractmethod
    def latest(self) -> SavedCheckpoint | None:
        """The latest checkpoint, if there is one by now."""

    @abstractmethod
    def check(self, workers: CallsRanks) -> None:
        """Refuse workers that could not resume from here."""

    @abstractmethod
    def finish(self, workers: CallsRanks) -> None:
        """Finish: training is done, so nobody will resume from here."""

    @abstractmethod
    def __enter__(self) -> "CheckpointKeeper": ...

    @abstractmethod
    def __exit__(self, *_: Any) -> None: ...


class DriverKeeper(CheckpointKeeper):
    """Keep checkpoints in a file on the driver, so that nodes need no shared storage."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self.save = _Send(self._name)

    @override
    def latest(self) -> "_Bytes | None":
        path = self._path()
        return _Bytes(path.read_bytes()) if path.exists() else None

    @override
    def check(self, workers: CallsRanks) -> None:
        """Do nothing: every worker gets the checkpoint from here."""

    @override
    def finish(self, workers: CallsRanks) -> None:
        """Do nothing: the file is removed with the block."""

    def keep(self, data: bytes) -> None:
        """Replace the last checkpoint, or leave it unchanged on failure."""
        fresh = self._path().with_suffix(".part")
        fresh.write_bytes(data)
        os.replace(fresh, self._path())

    def _path(self) -> Path:
        return Path(self._directory.name) / "latest.ckpt"

    @override
    def __enter__(self) -> "DriverKeeper":
        self._directory = tempfile.TemporaryDirectory(prefix="lightning_mgpu_")
        _all[self._name] = self
        return self

    @override
    def __exit__(self, *_: Any) -> None:
        del _all[self._name]
        self._directory.cleanup()


@dataclass(frozen=True)
class _Bytes:
    data: bytes

    def copy_to(self, file: IO[bytes]) -> bool:
        file.write(self.data)
        return True


@dataclass(frozen=True)
class _Send:
    name: str

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        call_on_driver(_keep, self.name, stream.getvalue())


_all: dict[str, DriverKeeper] = {}


def _keep(name: str, data: bytes) -> None:
    _all[name].keep(data)
