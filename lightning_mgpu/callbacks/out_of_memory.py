"""Compute batches that do not fit in memory in parts."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    DDPStrategy,
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from lightning_mgpu.callbacks.step_in_parts import StepInParts
from lightning_mgpu.callbacks.step_replay import loss_of
from lightning_mgpu.engine.device import release_memory
from lightning_mgpu.engine.error_notes import add_note
from lightning_mgpu.strategies.base.checks import has_synchronised_layers
from lightning_mgpu.strategies.base.memory_note import is_out_of_memory
from lightning_mgpu.strategies.base.method_override import MethodOverride
from lightning_mgpu.strategies.base.run_callback import RunCallback
from lightning_mgpu.strategies.resume.random_sources import accelerators
from lightning_mgpu.strategies.stages.pipelined import PipelineMixin

log = logging.getLogger(__name__)

_FROM_THE_START = "Compute them in parts from the start: `OutOfMemoryGuard(parts={})`."


class OutOfMemoryGuard(RunCallback):
    """When a training step runs out of memory, compute its batch in 2, 4, 8 ... parts.

    Gradients are summed up over the parts, so that the optimizer makes the step of the whole batch,
    if the loss is a mean over samples. Later batches are computed in as many parts from the start.

    Args:
        parts: How many to begin with.

    Raises:
        ValueError: `parts` is less than 1.
    """

    def __init__(self, parts: int = 1) -> None:
        if parts < 1:
            raise ValueError(f"`OutOfMemoryGuard(parts={parts})`: use a number from 1 on.")
        self.parts = parts
        """How many parts batches are computed in by now."""
        self._step: StepInParts | None = None
        self._overrides: list[MethodOverride] = []
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A rank starts anew.
        return vars(OutOfMemoryGuard(self.parts))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_run()
        if stage != "fit":
            return
        _check(trainer)
        strategy = trainer.strategy
        # DDP wants one call of its own for a step, however many parts are computed within.
        holder: Any = pl_module if isinstance(strategy, DDPStrategy) else strategy
        self._step = step = StepInParts(trainer, holder.training_step)

        def training_step(_: Any, *args: Any, **kwargs: Any) -> Any:
            step.begin(args, kwargs)
            return self._attempt(trainer, step)

        def backward(own: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._backward(trainer, step, own, loss, *args, **kwargs)

        self._overrides = [
            MethodOverride(holder, "training_step", training_step),
            MethodOverride(strategy, "backward", backward),
        ]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is not None:
            self._step.look_again()

    @override
    def _end_run(self) -> None:
        for each in self._overrides:
            each.remove()
        self._overrides = []
        self._step = None

    def _attempt(self, trainer: Trainer, step: StepInParts) -> Any:
        if self.parts == 1:
            try:
                return step.whole()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                words = str(error)
            self._more(trainer, step, words)
        return self._in_parts(trainer, step)

    def _in_parts(self, trainer: Trainer, step: StepInParts, logs: bool = True) -> Any:
        while True:
            shards = self._shards(step)
            try:
                output = step.in_parts(shards, logs)
                self._tell_differences(trainer, step)
                return output
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                words = str(error)
                if len(shards) < self.parts or max(shard.size for shard in shards) == 1:
                    add_note(error, "(In parts that cannot be smaller, it does not fit either.)")
                    raise
            self._more(trainer, step, words)

    def _shards(self, step: StepInParts) -> Any:
        try:
            return step.split(self.parts)
        except ValueError as error:
            raise torch.OutOfMemoryError(
                f"The batch does not fit in memory, and cannot be split: {error}"
            ) from error

    def _more(self, trainer: Trainer, step: StepInParts, words: str) -> None:
        """Go on with twice as many parts, after an attempt that has failed."""
        self.parts *= 2
        step.undo()
        release_memory(accelerators(trainer))
        if trainer.is_global_zero:
            reason = words.splitlines()[0] if words else "no more is known"
            log.warning(
                "Out of memory (%s): this batch and later ones are computed in %d parts, whose"
                " gradients are summed up as those of a loss that is a mean over samples.",
                reason,
                self.parts,
            )

    def _tell_differences(self, trainer: Trainer, step: StepInParts) -> None:
        for name, differs, words in (
            ("random", step.drew, "draws other random numbers than for the whole batch"),
            ("norm", step.trains_batch_norm(), "normalises each part with its own statistics"),
        ):
            if differs and name not in self._told:
                self._told.add(name)
                if trainer.is_global_zero:
                    log.warning("Computed in parts, the model %s.", words)

    def _backward(
        self,
        trainer: Trainer,
        step: StepInParts,
        own: Callable[..., Tensor],
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        parameters = list(trainer.lightning_module.parameters())
        accumulates = any(parameter.grad is not None for parameter in parameters)
        with _noted_if(isinstance(trainer.strategy, DDPStrategy), _of_ranks(self.parts)):
            try:
                return own(loss, *args, **kwargs)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.parts > 1:
                    raise
                if isinstance(trainer.strategy, DDPStrategy):
                    raise
                if accumulates:
                    add_note(error, _of_accumulation(self.parts))
                    raise
                words = str(error)
        for parameter in parameters:
            parameter.grad = None
        loss.detach_()  # its graph, of which others keep the loss
        self._more(trainer, step, words)
        output = loss_of(self._in_parts(trainer, step, logs=False))
        assert output is not None
        return own(output / trainer.accumulate_grad_batches, *args, **kwargs)


def _check(trainer: Trainer) -> None:
    strategy, model = trainer.strategy, trainer.lightning_module
    name = type(strategy).__name__
    if not model.automatic_optimization:
        raise MisconfigurationException(
            "`OutOfMemoryGuard` cannot compute parts of a step with manual optimization, which"
            " steps optimizers itself. Split the batch in `training_step`, or leave it out."
        )
    if isinstance(strategy, PipelineMixin):
        raise MisconfigurationException(
            f"`OutOfMemoryGuard` is not for `{name}`, which computes batches in parts already. Give"
            " it more of them, `chunks=32`, or `checkpoint='always'`."
        )
    if trainer.world_size > 1 and has_synchronised_layers(model):
        raise MisconfigurationException(
            "`OutOfMemoryGuard` is not for `SyncBatchNorm`, whose forward waits for all ranks: they"
            " may compute different numbers of parts. Use a smaller batch with"
            " `accumulate_grad_batches`."
        )
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        raise MisconfigurationException(
            f"`OutOfMemoryGuard` is not for `{name}`, whose ranks compute each layer together: one"
            " cannot begin again alone. Use a smaller batch with `accumulate_grad_batches`."
        )


@contextmanager
def _noted_if(condition: bool, note: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if condition and is_out_of_memory(error):
            add_note(error, note)
        raise


def _of_ranks(parts: int) -> str:
    return (
        "(In backward ranks exchange gradients, and one cannot begin again alone."
        f" {_FROM_THE_START.format(2 * parts)})"
    )


def _of_accumulation(parts: int) -> str:
    return (
        "(Backward has added to the gradients of earlier batches, of which there is no copy."
        f" {_FROM_THE_START.format(2 * parts)})"
    )
