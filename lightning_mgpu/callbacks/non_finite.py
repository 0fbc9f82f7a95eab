"""Catch steps whose loss or gradients are NaN or infinite, before they reach the weights."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from lightning_mgpu._compat.torch import scales_gradients
from lightning_mgpu.callbacks.bundle import save_bundle
from lightning_mgpu.callbacks.snapshots import Snapshots
from lightning_mgpu.callbacks.step_record import Recorder, StepRecord
from lightning_mgpu.callbacks.step_replay import (
    Found,
    find,
    gradients_not_finite,
    local,
    why_not_replayed,
)
from lightning_mgpu.engine.finite_watch import not_finite
from lightning_mgpu.errors import NonFiniteError
from lightning_mgpu.strategies.base.method_override import MethodOverride
from lightning_mgpu.strategies.base.run_callback import RunCallback
from lightning_mgpu.strategies.resume import rank_state

log = logging.getLogger(__name__)

Action = Literal["stop", "skip", "rollback"]

_ADVICE = (
    "Look at what goes into it: a logarithm, root or quotient of 0, an overflow. Otherwise lower"
    " the learning rate, or clip gradients."
)


@dataclass(frozen=True)
class _Bad:
    """A step that is not finite on this rank."""

    symptom: str
    record: StepRecord
    batch_idx: int


class NonFiniteGuard(RunCallback):
    """Catch NaN and Inf in loss and gradients before the optimizer's step, and say where from.

    Each step is watched by one number, the norm of the gradients plus the loss. When that is not
    finite, the step is computed again from the same batch, weights, buffers and random states,
    operation by operation, to name the first one that went wrong. All ranks do the same.

    Args:
        action: ``"stop"`` (default) raises `NonFiniteError`, with the weights from before the step.
            ``"skip"`` leaves out the optimizer's step. ``"rollback"`` leaves it out and puts
            weights and optimizer state back to those of `rollback_steps` steps ago.
        max_skips: How many steps in a row may be left out, with ``"skip"`` and ``"rollback"``.
        rollback_steps: How many optimizer steps to go back at least, once there are so many.
        bundle: Whether to save what the first such step starts from, for ``mode=replay``.
        dirpath: The directory for that; default: the Trainer's `default_root_dir`.

    Raises:
        ValueError: An argument is none of its choices.
    """

    def __init__(
        self,
        action: Action = "stop",
        max_skips: int = 10,
        rollback_steps: int = 100,
        bundle: bool = True,
        dirpath: str | Path | None = None,
    ) -> None:
        if action not in ("stop", "skip", "rollback"):
            raise ValueError(
                f"`NonFiniteGuard(action={action!r})`: use 'stop', 'skip' (leave the step out) or"
                " 'rollback' (go back to earlier weights)."
            )
        for name, value in (("max_skips", max_skips), ("rollback_steps", rollback_steps)):
            if value < 1:
                raise ValueError(f"`NonFiniteGuard({name}={value})`: use a number from 1 on.")
        self.action, self.max_skips, self.rollback_steps = action, max_skips, rollback_steps
        self.bundle, self.dirpath = bundle, None if dirpath is None else Path(dirpath)
        self.skipped = 0
        """How many optimizer steps have been left out in this run."""
        self._in_a_row: dict[int, int] = {}
        self._recorder: Recorder | None = None
        self._snapshots: Snapshots | None = None
        self._record: StepRecord | None = None
        self._loss: Tensor | None = None
        self._bad: _Bad | None = None
        self._batch_idx = 0
        self._saved: Path | None = None
        self._override: MethodOverride | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A rank starts anew.
        options = (self.action, self.max_skips, self.rollback_steps, self.bundle, self.dirpath)
        return vars(NonFiniteGuard(*options))

    # --- Watching

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_run()
        if stage != "fit":
            return
        strategy = trainer.strategy
        if strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"`NonFiniteGuard` needs the gradients, which `{type(strategy).__name__}` keeps to"
                " itself. Use another strategy, or leave the callback out."
            )
        self.skipped, self._in_a_row, self._saved = 0, {}, None
        self._recorder = recorder = Recorder(trainer)
        if self.action == "rollback":
            self._snapshots = Snapshots(self.rollback_steps)

        def training_step(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._record = recorder.take(args, kwargs)
            return own(*args, **kwargs)

        # The last thing before the step: whatever hooks draw or change has happened by then.
        self._override = MethodOverride(strategy, "training_step", training_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.look_again()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx
        if self._snapshots is not None:
            self._snapshots.look(trainer)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._loss = loss.detach()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, record = self._loss, self._record
        if self._bad is not None or loss is None or record is None:
            return  # of an accumulation, the first one counts
        value = loss.sum()
        if not _scales(trainer):
            norm = torch.nn.utils.get_total_norm(_gradients(trainer.optimizers))
            value = value + norm.to(value.device)
        if math.isfinite(float(value)):
            return
        symptom = self._symptom(trainer, pl_module, loss)
        if symptom:  # (or else large numbers, whose squares have no place)
            assert self._recorder is not None
            self._recorder.keep()
            self._bad = _Bad(symptom, record, self._batch_idx)

    def _symptom(self, trainer: Trainer, model: LightningModule, loss: Tensor) -> str:
        what = not_finite(loss)
        if what is not None:
            return f"the loss is {what}"
        # (Too large a scale makes infinite gradients every now and then. That is how a scaler
        # finds out, and leaves the step out itself.)
        return "" if _scales(trainer) else gradients_not_finite(model)

    # --- Acting

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        bad, self._bad = self._bad, None
        number = _number(trainer, optimizer)
        if not trainer.strategy.reduce_boolean_decision(bad is not None, all=False):
            self._in_a_row[number] = 0
            return
        self._in_a_row[number] = in_a_row = self._in_a_row.get(number, 0) + 1
        found = find(trainer, None if bad is None else bad.record)
        everybody = rank_state.gathered((found, None if bad is None else bad.symptom))
        words = self._words(trainer, bad, everybody)
        saved = self._keep(trainer, bad, words, everybody)
        if self.action == "stop":
            raise NonFiniteError(
                words,
                f"{saved}The weights are those from before this step. {_ADVICE} Or go on without"
                " such steps: `NonFiniteGuard(action='skip')` or 'rollback'.",
            )
        if in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{words} It is number {in_a_row} in a row, more than"
                f" `NonFiniteGuard(max_skips={self.max_skips})`.",
                f"{saved}{_ADVICE}",
            )
        _leave_out(trainer, optimizer)
        self.skipped += 1
        done = "The optimizer's step is left out."
        if self._snapshots is not None:
            step = self._snapshots.go_back(trainer)
            done = f"Weights and optimizer state are back to those of step {step}."
        if trainer.is_global_zero:
            log.warning("%s %s%s (%d so far.)", words, saved, done, self.skipped)
        pl_module.log("non_finite_steps", float(self.skipped), rank_zero_only=True)

    def _words(self, trainer: Trainer, bad: _Bad | None, everybody: list[Any]) -> str:
        symptoms = [symptom for _, symptom in everybody if symptom]
        first = _first([found for found, _ in everybody])
        batch = self._batch_idx if bad is None else bad.batch_idx
        words = (
            f"Step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch}):"
            f" {symptoms[0]}."
        )
        if first.place is not None:
            rank = f", rank {first.rank} of {trainer.world_size}" if trainer.world_size > 1 else ""
            words += f" First: {first.place}{rank}."
        return f"{words} {first.note}" if first.note else words

    def _keep(self, trainer: Trainer, bad: _Bad | None, words: str, everybody: list[Any]) -> str:
        """Save the step on the rank where it went wrong; returns what to say of that."""
        if not self.bundle or self._saved is not None or why_not_replayed(trainer):
            return ""
        rank = _first([found for found, symptom in everybody if symptom]).rank
        suffix = f"-rank{rank}" if trainer.world_size > 1 else ""
        directory = self.dirpath or Path(trainer.default_root_dir)
        self._saved = path = directory / f"non_finite-step{trainer.global_step}{suffix}.pt"
        written = True
        if trainer.global_rank == rank:
            assert bad is not None
            facts = {
                "words": words,
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "batch_idx": bad.batch_idx,
                "rank": rank,
            }
            written = save_bundle(path, trainer, bad.record, facts)
        if not all(rank_state.gathered(written)):
            return ""
        return f"To see it again: python -m lightning_mgpu mode=replay bundle={path}. "

    # --- Ending

    @override
    def _end_run(self) -> None:
        if self._override is not None:
            self._override.remove()
        self._override = self._recorder = self._snapshots = None
        self._record = self._loss = self._bad = None


def _gradients(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """The gradients that optimizers are to use."""
    return [
        local(parameter.grad)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def _leave_out(trainer: Trainer, optimizer: Any) -> None:
    """Have an optimizer's step change nothing, and those of others that the same loss went to."""
    if _scales(trainer) and scales_gradients(optimizer):
        return  # the scaler finds out itself, and wants to see them
    for each in trainer.optimizers:
        if each is optimizer or any(map(not_finite, _gradients([each]))):
            each.zero_grad(set_to_none=True)  # without gradients a step changes nothing


def _scales(trainer: Trainer) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def _first(found: list[Found]) -> Found:
    return min(found, key=lambda each: (each.place is None, not each.note, each.rank))


def _number(trainer: Trainer, optimizer: Any) -> int:
    numbers = [i for i, each in enumerate(trainer.optimizers) if each is optimizer]
    return numbers[0] if numbers else -1
