"""The latest state of a training that may lose its workers: sent to the driver, and kept there."""

import io
import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_mgpu.ray.worker import call_on_driver

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_mgpu.ray.strategy import OnRay

__all__: list[str] = []


class Autosave(Checkpoint):
    """Sends a checkpoint to the driver after each epoch.

    A `Checkpoint`, since Lightning calls those after all other callbacks.

    Args:
        name: Of the driver's `Kept`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @override
    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        # On every rank, since a checkpoint may take all of them.
        strategy: OnRay = trainer.strategy  # type: ignore[assignment]
        checkpoint = strategy.dump_checkpoint(trainer)
        if trainer.is_global_zero:
            stream = io.BytesIO()
            torch.save(checkpoint, stream)
            call_on_driver(_keep, self._name, stream.getvalue())


class Kept:
    """The driver's place for the latest checkpoint of one training; gone with the block."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex

    def latest(self) -> bytes | None:
        """The checkpoint, if there is one by now."""
        path = self._path()
        return path.read_bytes() if path.exists() else None

    def keep(self, data: bytes) -> None:
        """Put a checkpoint in the place of the last one, or leave that as it is."""
        fresh = self._path().with_suffix(".part")
        fresh.write_bytes(data)
        os.replace(fresh, self._path())

    def _path(self) -> Path:
        return Path(self._directory.name) / "latest.ckpt"

    def __enter__(self) -> "Kept":
        self._directory = tempfile.TemporaryDirectory(prefix="lightning_mgpu_")
        _all[self.name] = self
        return self

    def __exit__(self, *_: Any) -> None:
        del _all[self.name]
        self._directory.cleanup()


_all: dict[str, Kept] = {}


def _keep(name: str, data: bytes) -> None:
    _all[name].keep(data)
