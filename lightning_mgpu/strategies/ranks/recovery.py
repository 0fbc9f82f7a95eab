"""Go on with training when a rank's process is lost, from a snapshot of the run."""

import copy
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    Callback,
    Checkpoint,
    CheckpointIO,
    TorchCheckpointIO,
)
from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.lightning_trainer import begin_again, resumed_from
from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.resume.exact_resume import ExactResume

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

# At a time there are the last one and the one that is being written; each holds the parameters and
# at most two moments of the optimizer. The rest is for other programs.
_SNAPSHOTS, _COPIES = 4, 3
_IN_MEMORY = Path("/dev/shm")


class Snapshots(Checkpoint):
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


class Recovery:
    """Runs `fit` again from a snapshot when a rank's process is lost.

    Args:
        max_failures: How often.
        every_n_steps: Optimizer steps between two snapshots.
    """

    def __init__(self, max_failures: int, every_n_steps: int) -> None:
        self._max_failures, self._every_n_steps = max_failures, every_n_steps

    def run(
        self,
        trainer: "Trainer",
        launch: Callable[..., Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what ``launch(function, args, kwargs)`` does.

        Args:
            trainer: The Trainer, about to fit.
            launch: Runs a function on all ranks.
            function: The Trainer's function that fits.
            args: Its arguments.
            kwargs: The same by name.

        Raises:
            WorkerDiedError: Once too often, or before training has begun.
        """
        modes = {module: module.training for module in trainer.lightning_module.modules()}
        place = tempfile.TemporaryDirectory(prefix="lightning_mgpu_", dir=_roomy(trainer))
        with place as directory, ExitStack() as stack:
            snapshots = Snapshots(self._every_n_steps, Path(directory))
            stack.callback(snapshots.close)
            stack.enter_context(_added(trainer, snapshots))
            for failures in itertools.count(1):
                try:
                    return launch(function, args, kwargs)
                except WorkerDiedError as error:
                    latest = snapshots.latest()
                    if failures > self._max_failures or latest is None:
                        raise
                    log.warning(
                        "%s. Training goes on from %s with new processes (failure %d of at most"
                        " %d).",
                        *(error, latest.stem.replace("-", " "), failures, self._max_failures),
                    )
                    for callback in callbacks_of(trainer):  # whatever they have set up
                        callback.on_exception(trainer, trainer.lightning_module, error)
                args, kwargs = resumed_from(function, args, kwargs, str(latest))
                begin_again(trainer)
                for module, training in modes.items():  # it may have been in validation
                    module.training = training
        raise AssertionError


@contextmanager
def _added(trainer: "Trainer", snapshots: Snapshots) -> Iterator[None]:
    """The Trainer with what snapshots take; as it was after the block."""
    before = list(callbacks_of(trainer))
    own: list[Callback] = [snapshots]
    if not any(isinstance(callback, ExactResume) for callback in before):
        own.insert(0, ExactResume())
    assign(trainer, "callbacks", [*before, *own])
    try:
        yield
    finally:
        kept = [callback for callback in callbacks_of(trainer) if callback not in own]
        assign(trainer, "callbacks", kept)


def _roomy(trainer: "Trainer") -> str | None:
    """A directory in memory, if there is room enough; `None` for the usual one on disk."""
    parameters = sum(p.nbytes for p in trainer.lightning_module.parameters())
    needed = _SNAPSHOTS * _COPIES * parameters
    if _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > needed:
        return str(_IN_MEMORY)
    return None


class _Writer(CheckpointIO):
    """Write one checkpoint after another in a thread; the last one stays."""

    def __init__(self, own: CheckpointIO) -> None:
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
        if type(self._own) is not TorchCheckpointIO:  # which has to read it, too
            self._own.save_checkpoint(checkpoint, path, storage_options)
            self._take(Path(path), self._own.remove_checkpoint)
            return
        copied = map_leaves(_copied, checkpoint)
        self._writing = self._thread.submit(self._write, copied, Path(path))

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    @override
    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            torch.save(checkpoint, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._take(path, Path.unlink)

    def _take(self, path: Path, remove: Callable[[Path], None]) -> None:
        before, self._latest = self._latest, path
        if before is not None and before != path:
            remove(before)

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
