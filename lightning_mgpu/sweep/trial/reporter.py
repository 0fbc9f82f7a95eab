"""Report metrics of a trial from Lightning's Trainer, without changes to the user's code.

Lightning asks `callbacks` for more callbacks whenever a Trainer is made (see the entry point in
pyproject.toml); only inside a trial there is one. Imports no Ray: the ranks of a distributed trial
receive the callback, too. Where those are workers on Ray, rank 0 asks the trial's process, which
waits for them.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    Checkpoint,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    TrainerFn,
)
from lightning_mgpu._compat.lightning_loops import is_epoch_trained
from lightning_mgpu._compat.lightning_results import set_callback_metrics
from lightning_mgpu._compat.lightning_trainer import restore_model_and_callbacks
from lightning_mgpu.ray import worker
from lightning_mgpu.sweep.store.records import BEST_CHECKPOINT, SAVED
from lightning_mgpu.sweep.trial import pbt, reporting

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.ckpt"
_GROUPS = "param_groups.json"
_METRICS = "metrics.json"
_OURS = "lightning_mgpu."


def callbacks() -> list[Checkpoint]:
    """Callbacks to add to a new Trainer."""
    trial = reporting.current()
    if trial is None:
        return []
    return [
        TrialReportCallback(trial.metrics, trial.every_n_epochs, trial.saves, trial.restore_from)
    ]


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
        self._written: dict[str, int] = {}  # when each checkpoint was
        self._metrics_before: dict[str, float] = {}  # of the run that goes on
        self._is_new = False  # a validation was not reported yet
        self._has_warned = False
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
        trial = reporting.current()
        kind = type(trainer.strategy)
        if trial is not None and trial.strategy and not kind.__module__.startswith(_OURS):
            reporting.warn_of_strategy(f"{kind.__module__}.{kind.__qualname__}")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _tell(trainer, reporting.warn_of_places, _places(trainer))
        self._groups = pbt.describe(trainer.optimizers)
        path, self._restore_from = self._restore_from, None
        trial = reporting.current()
        if path is None or (trial is not None and trial.restore_from is None):
            return
        _tell(trainer, reporting.note_restored)  # a second fit of the trial starts as the user says
        self._mutations = pbt.compare(json.loads((path / _GROUPS).read_text()), self._groups)
        restore_model_and_callbacks(trainer, path / CHECKPOINT)
        metrics = path / _METRICS
        self._metrics_before = json.loads(metrics.read_text()) if metrics.exists() else {}
        _take_over_last(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where all epochs were trained before, nothing was logged, and the job may ask for metrics.
        lacking = self._metrics_before.keys() - trainer.callback_metrics.keys()
        values = {name: torch.tensor(self._metrics_before[name]) for name in lacking}
        set_callback_metrics(trainer, values)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.restarting:  # nor after the loss of a rank
            _tell(trainer, reporting.note_fit, trainer.current_epoch)
        pbt.apply(self._mutations, trainer.optimizers, trainer.lr_scheduler_configs)
        self._mutations = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = _numbers(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_training(trainer):
            if not trainer.sanity_checking:
                _tell(trainer, reporting.note, _numbers(trainer), {})
            return
        now = _numbers(trainer)
        self._validation_names |= {n for n, v in now.items() if self._before.get(n) != v}
        self._is_new = True
        if not is_epoch_trained(trainer):  # else at the end of the epoch
            self._report(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_new or not self._metrics <= self._validation_names:
            self._report(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _tell(trainer, reporting.note, _numbers(trainer), {})

    def _report(self, trainer: Trainer) -> None:
        is_validated, self._is_new = self._is_new or not trainer.enable_validation, False
        metrics = _numbers(trainer)
        best = _best_checkpoint(trainer)
        _tell(trainer, reporting.note, metrics, best, trainer.current_epoch)
        if is_validated and not self._has_warned and not self._metrics <= metrics.keys():
            self._has_warned = True
            _tell(trainer, reporting.warn_of_missing)
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if not is_due or not self._metrics or not self._metrics <= metrics.keys():
            return
        for name in sorted(self._metrics):
            if not math.isfinite(metrics[name]):
                epoch = trainer.current_epoch
                raise reporting.NotFiniteError(f"{name} is {metrics[name]} in epoch {epoch}")
        directory = self._save(trainer) if self._saves else None
        more: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        if saved := self._saved_since(trainer):
            more[SAVED] = saved
        try:
            self._send(trainer, {**metrics, **more, **best}, directory)
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def _send(self, trainer: Trainer, metrics: dict[str, Any], directory: Path | None) -> None:
        stop = False
        if trainer.is_global_zero:
            if not worker.is_worker():
                stop = reporting.deliver(metrics, directory)
                if stop and trainer.world_size == 1:
                    raise SystemExit(0)
            elif directory is None:
                stop = worker.ask_driver(reporting.deliver, metrics, None)
            else:
                stop = worker.ask_driver(reporting.deliver_files, metrics, _read(directory))
        # Leaving from rank 0 alone would take the other ranks' processes with it, which the next
        # trial can use: all of them come to the end of `fit` together.
        trainer.should_stop = trainer.should_stop or trainer.strategy.broadcast(stop)

    def _saved_since(self, trainer: Trainer) -> list[tuple[str, int]]:
        """Checkpoints of the job's own that were written since the last report, with the epoch."""
        found = {path: _written(path) for path in _checkpoints(trainer)}
        new = [path for path, when in found.items() if when and when != self._written.get(path)]
        self._written.update(found)
        return [(path, trainer.current_epoch) for path in new]

    def _save(self, trainer: Trainer) -> Path:
        directory = Path(trainer.strategy.broadcast(tempfile.mkdtemp(prefix="trial-")))
        trainer.save_checkpoint(directory / CHECKPOINT)
        if trainer.is_global_zero:
            (directory / _GROUPS).write_text(json.dumps(self._groups))
            (directory / _METRICS).write_text(json.dumps(_numbers(trainer)))
        return directory


def _read(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _is_training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _numbers(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _places(trainer: Trainer) -> dict[str, list[str]]:
    """Directories on this machine where loggers and callbacks write."""
    # Others, such as wandb, have a run of a unique name in a directory for all.
    logs = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    saves = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return {
        kind: [os.path.abspath(place) for place in found if place and "://" not in str(place)]
        for kind, found in (("logs", logs), ("checkpoints", saves))
    }


def _take_over_last(trainer: Trainer) -> None:
    """Let `last.ckpt` of an abandoned run, in the same directory, be written over.

    Or Lightning would keep it, and call the new one `last-v1.ckpt`.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath:
            name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            path = Path(callback.dirpath, name)
            if path.exists():
                callback.last_model_path = str(path)


def _checkpoints(trainer: Trainer) -> list[str]:
    """Paths of all checkpoints that the job's callbacks know."""
    known: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            known += [callback.best_model_path, *callback.best_k_models, callback.last_model_path]
    return list(dict.fromkeys(str(path) for path in known if path))


def _written(path: str) -> int:
    """Time of the last change of a file; 0 if there is none, as on another machine."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _best_checkpoint(trainer: Trainer) -> dict[str, str]:
    """Best checkpoint of the first callback with a metric, or else the latest, if one was saved."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found.sort(key=lambda callback: callback.monitor is None)
    paths = (callback.best_model_path for callback in found)
    return next(({BEST_CHECKPOINT: path} for path in paths if path), {})
