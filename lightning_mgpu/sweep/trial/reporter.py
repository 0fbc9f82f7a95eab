"""Report metrics of a trial from Lightning's Trainer, without changes to the user's code.

Lightning asks `callbacks` for more callbacks whenever a Trainer is made (see the entry point in
pyproject.toml); only inside a trial there is one. Imports no Ray: the ranks of a distributed trial
receive the callback, too. Where those are workers on Ray, rank 0 asks the trial's process, which
waits for them.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from hydra_plugins.ray_tune_sweeper import _lightning
from lightning_mgpu.ray import worker
from lightning_mgpu.sweep.store.records import BEST_CHECKPOINT
from lightning_mgpu.sweep.trial import pbt

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.ckpt"
_GROUPS = "param_groups.json"


class NotFiniteError(ArithmeticError):
    """The metric of a trial is NaN or infinite."""


@dataclass
class Reporting:
    """Settings of the reports of this process's trial.

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


def begin(reporting: Reporting) -> None:
    """Start a trial in this process."""
    global _current
    _current = reporting
    _lightning.factory = callbacks


def end() -> None:
    """End the trial."""
    global _current
    _current = None
    _lightning.factory = None


def is_stopped() -> bool:
    """Return whether this process's trial has been told to end."""
    return _current is not None and _current.stopped


def callbacks() -> list[Checkpoint]:
    """Callbacks to add to a new Trainer."""
    if _current is None:
        return []
    return [
        TrialReportCallback(
            _current.metrics, _current.every_n_epochs, _current.saves, _current.restore_from
        )
    ]


def deliver(metrics: dict[str, Any], directory: Path | None) -> bool:
    """Report in the process of the trial; return whether the trial is to end."""
    if _current is None or _current.stopped:
        return False
    _current.sent += 1
    try:
        _current.send(metrics, directory)
    except SystemExit:
        _current.stopped = True
    return _current.stopped


def _deliver_files(metrics: dict[str, Any], files: dict[str, bytes]) -> bool:
    """Report a checkpoint that may have been made on another machine."""
    with tempfile.TemporaryDirectory(prefix="trial-") as directory:
        for name, data in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return deliver(metrics, Path(directory))


def _note(seen: set[str], best_checkpoint: dict[str, str]) -> None:
    if _current is not None:
        _current.seen |= seen
        _current.best_checkpoint |= best_checkpoint


def _note_restored() -> None:
    if _current is not None:
        _current.restore_from = None


def _tell(trainer: Trainer, function: Callable[..., None], *args: Any) -> None:
    """Call a function in the process of the trial."""
    if not trainer.is_global_zero:
        return
    if worker.is_worker():  # and the trial is elsewhere
        worker.call_on_driver(function, *args)
    else:
        function(*args)


class TrialReportCallback(Checkpoint):
    """Report at the end of each epoch, and after each validation in between.

    A `Checkpoint`, since Lightning calls those last: a trial that is stopped in here has saved what
    its other callbacks save.
    """

    best_model_path = ""  # Lightning reads it where this is the only one

    def __init__(
        self,
        metrics: tuple[str, ...],
        every_n_epochs: int,
        saves: bool,
        restore_from: Path | None,
    ) -> None:
        self._metrics = frozenset(metrics)
        self._every_n_epochs = every_n_epochs
        self._saves = saves
        self._restore_from = restore_from
        self._is_new = False  # a validation was not reported yet
        self._before: dict[str, float] = {}
        self._validation_names: set[str] = set()
        self._groups: pbt.Groups = []
        self._mutations: list[pbt.Mutation] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Once: a list of callbacks that two Trainers share has those of both.
        attributes = vars(trainer)  # `callbacks` is set by a connector, and no declared attribute
        others = [c for c in attributes["callbacks"] if not isinstance(c, TrialReportCallback)]
        attributes["callbacks"] = [*others, self]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = pbt.describe(trainer.optimizers)
        path, self._restore_from = self._restore_from, None
        if path is None or (_current is not None and _current.restore_from is None):
            return
        _tell(trainer, _note_restored)  # a second fit of the trial starts as the user says
        self._mutations = pbt.compare(json.loads((path / _GROUPS).read_text()), self._groups)
        # Lightning restores what is left, loops and optimizers, right after this hook.
        trainer._checkpoint_connector._restore_modules_and_callbacks(path / CHECKPOINT, False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pbt.apply(self._mutations, trainer.optimizers, trainer.lr_scheduler_configs)
        self._mutations = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = _numbers(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_training(trainer):
            return
        now = _numbers(trainer)
        self._validation_names |= {n for n, v in now.items() if self._before.get(n) != v}
        self._is_new = True
        if not trainer.fit_loop.epoch_loop._is_training_done:  # else at the end of the epoch
            self._report(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_new or not self._metrics <= self._validation_names:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        self._is_new = False
        metrics = _numbers(trainer)
        best = _best_checkpoint(trainer)
        _tell(trainer, _note, set(metrics), best)
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if not is_due or not self._metrics or not self._metrics <= metrics.keys():
            return
        for name in sorted(self._metrics):
            if not math.isfinite(metrics[name]):
                epoch = trainer.current_epoch
                raise NotFiniteError(f"{name} is {metrics[name]} in epoch {epoch}")
        directory = self._save(trainer) if self._saves else None
        more = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        try:
            self._send(trainer, {**metrics, **more, **best}, directory)
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def _send(self, trainer: Trainer, metrics: dict[str, Any], directory: Path | None) -> None:
        stop = False
        if trainer.is_global_zero:
            if not worker.is_worker():
                stop = deliver(metrics, directory)
                if stop and trainer.world_size == 1:
                    raise SystemExit(0)
            elif directory is None:
                stop = worker.ask_driver(deliver, metrics, None)
            else:
                stop = worker.ask_driver(_deliver_files, metrics, _read(directory))
        # Leaving from rank 0 alone would take the other ranks' processes with it, which the next
        # trial can use: all of them come to the end of `fit` together.
        trainer.should_stop = trainer.should_stop or trainer.strategy.broadcast(stop)

    def _save(self, trainer: Trainer) -> Path:
        directory = Path(trainer.strategy.broadcast(tempfile.mkdtemp(prefix="trial-")))
        trainer.save_checkpoint(directory / CHECKPOINT)
        if trainer.is_global_zero:
            (directory / _GROUPS).write_text(json.dumps(self._groups))
        return directory


def _read(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _is_training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _numbers(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _best_checkpoint(trainer: Trainer) -> dict[str, str]:
    """Best checkpoint of the first callback with a metric, or else the latest."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found.sort(key=lambda callback: callback.monitor is None)
    return {BEST_CHECKPOINT: found[0].best_model_path} if found else {}
