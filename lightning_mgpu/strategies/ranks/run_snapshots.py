"""Snapshots of a run while it goes on, from which it can be taken up."""

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from lightning_mgpu._compat.lightning import AsyncCheckpointIO, Checkpoint, CheckpointIO
from lightning_mgpu.engine.batch import map_leaves

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class RunSnapshots(Checkpoint):
    """Save the state of training every so many optimizer steps, and before the first.

    A `Checkpoint`, since Lightning calls those after all other callbacks. Of each snapshot tensors
    are copied; it is written while the next steps compute.

    Args:
        every_n_steps: How many.
        directory: Where they go, on this machine.
    """

    def __init__(self, every_n_steps: int, directory: Path) -> None:
        self._every_n_steps, self._directory = every_n_steps, directory
        self._last: int | None = None
        self._writer: _Writer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_writer": None}

    def latest(self) -> Path | None:
        """The last one that has been written in full; `None` if there is none."""
        return None if self._writer is None else self._writer.latest()

    def close(self) -> None:
        """Wait for the one that is being written."""
        if self._writer is not None:
            self._writer.close()

    @override
    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._last is None:
            self._save(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: "Trainer",
        pl_module: "LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._last is None or trainer.global_step >= self._last + self._every_n_steps:
            self._save(trainer)

    def _save(self, trainer: "Trainer") -> None:
        strategy = trainer.strategy
        own = strategy.checkpoint_io
        if self._writer is None:
            self._writer = _Writer(own)
        strategy.checkpoint_io = self._writer
        try:
            path = self._directory / f"step-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            strategy.checkpoint_io = own
        self._last = trainer.global_step


class _Writer(CheckpointIO):
    """Save one checkpoint after another in a thread, in place of the last one.

    Unlike Lightning's `AsyncCheckpointIO` it copies to the host, knows which is the last that was
    saved whole, and lets training go on if one cannot be saved.

    Args:
        own: Saves them, and will load them.
    """

    def __init__(self, own: CheckpointIO) -> None:
        while isinstance(own, AsyncCheckpointIO) and own.checkpoint_io is not None:
            own = own.checkpoint_io
        self._own = own
        self._thread = ThreadPoolExecutor(1, "mgpu-snapshot")
        self._writing: Future[None] | None = None
        self._latest: Path | None = None

    def latest(self) -> Path | None:
        self._wait()
        return self._latest

    def close(self) -> None:
        self._wait()
        self._thread.shutdown()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self._wait()
        copied = map_leaves(_copied, checkpoint)
        self._writing = self._thread.submit(self._write, copied, Path(path))

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._own.load_checkpoint(*args, **kwargs)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self._own.remove_checkpoint(path)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            self._own.save_checkpoint(checkpoint, path)
        except BaseException:
            with suppress(Exception):  # what there is of it takes up room
                self._own.remove_checkpoint(path)
            raise
        before, self._latest = self._latest, path
        if before is not None and before != path:
            self._own.remove_checkpoint(before)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:  # such as torch's own of a disk that is full
            log.warning("A snapshot could not be written: %s. The one before stays.", error)


def _copied(value: Any) -> Any:
    """A copy that later steps do not change; tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is as it is when it is written
        return value
