"""The latest state of a training that may lose its workers, and the driver's place for it."""

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

from lightning_mgpu.ray.worker import Saved, call_on_driver

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Save = Callable[[dict[str, Any]], None]
"""Keeps a checkpoint in place of the last one; called on rank 0."""


class Autosave(Checkpoint):
    """Keeps a checkpoint after each epoch.

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
                logger.save()  # whoever goes on from here does not log it again


class CallsRanks(Protocol):
    """Workers between two runs."""

    def call(self, function: Callable[[], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Call a function on all of them, or on those of some ranks, and wait for the results."""


class Keeper(ABC):
    """Where the checkpoints of one training are kept, as the driver knows it; gone with the block.

    Attributes:
        save: For the workers.
    """

    save: Save

    @abstractmethod
    def latest(self) -> Saved | None:
        """The latest checkpoint, if there is one by now."""

    @abstractmethod
    def check(self, workers: CallsRanks) -> None:
        """Refuse workers that could not go on from here."""

    @abstractmethod
    def finish(self, workers: CallsRanks) -> None:
        """Training is done, so nobody will go on from here."""

    @abstractmethod
    def __enter__(self) -> "Keeper": ...

    @abstractmethod
    def __exit__(self, *_: Any) -> None: ...


class DriverKeeper(Keeper):
    """Keeps them in a file beside the driver: no node has to share any storage with another."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self.save = _Send(self._name)

    @override
    def latest(self) -> "_Bytes | None":
        path = self._path()
        return _Bytes(path.read_bytes()) if path.exists() else None

    @override
    def check(self, workers: CallsRanks) -> None:
        """Nothing to refuse: every worker gets the checkpoint from here."""

    @override
    def finish(self, workers: CallsRanks) -> None:
        """Nothing to do: the file goes with the block."""

    def keep(self, data: bytes) -> None:
        """Put a checkpoint in the place of the last one, or leave that as it is."""
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
