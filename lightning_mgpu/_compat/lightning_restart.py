"""What a fit loop leaves out after a restart, and how to have it done.

What comes after a checkpoint within the same batch or epoch is not done again by a Trainer that
goes on from it: validation and the end of the epoch, if it was written when the epoch's last batch
had ended; the step of `ReduceLROnPlateau`, if at the end of the epoch.
"""

from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning_attributes import assign

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer


def batches_trained(trainer: "Trainer") -> int:
    """How many batches of the epoch have been trained."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def batches_begun(trainer: "Trainer") -> int:
    """How many batches have been begun and are not trained: one, or none."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.ready - current.processed)


def is_at_batch_end(trainer: "Trainer") -> bool:
    """Whether hooks of a batch's end are running."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(total.processed > total.completed)


def is_within_batch(trainer: "Trainer") -> bool:
    """Whether a batch of training or validation has begun and is not yet computed."""
    loop = trainer.fit_loop.epoch_loop
    totals: list[Any] = [loop.batch_progress.total, loop.val_loop.batch_progress.total]
    return any(total.ready > total.processed for total in totals)


def is_at_epoch_start(trainer: "Trainer") -> bool:
    """Whether hooks of a training epoch's start are running."""
    total: Any = trainer.fit_loop.epoch_progress.total
    return bool(total.ready > total.started)


def is_at_epoch_end(trainer: "Trainer") -> bool:
    """Whether hooks of a training epoch's end are running."""
    total: Any = trainer.fit_loop.epoch_progress.total
    return bool(total.processed > total.completed)


def is_last_batch(trainer: "Trainer") -> bool:
    """Whether the epoch has no batch after the one at hand, whenever training ends."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_validation_due(trainer: "Trainer") -> bool:
    """Whether validation follows, at the end of a batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_accumulating(trainer: "Trainer") -> bool:
    """Whether the gradients of the batch at hand wait for those of the next."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def end_batch(checkpoint: dict[str, Any], validates: bool, steps: int) -> None:
    """Have a restart begin after a batch whose end the checkpoint stands at.

    Args:
        checkpoint: Before its loops are restored.
        validates: Whether with the validation that follows.
        steps: How many optimizer steps the batch has made.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    if not validates:
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += steps
        return
    # As if it had been interrupted in the first batch.
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["current"] = dict.fromkeys(validation["current"], 0)
    total = validation["total"]
    total["completed"] = total["processed"]
    total["ready"] = total["started"] = total["processed"] + 1


def begin_epoch(checkpoint: dict[str, Any]) -> None:
    """Have a restart begin an epoch at whose start the checkpoint stands.

    Args:
        checkpoint: Before its loops are restored.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    progress = (batches, loop["epoch_loop.scheduler_progress"], *optimizer.values())
    for part in progress:
        part["current"] = dict.fromkeys(part["current"], 0)
    batches["is_last_batch"] = False
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["total"] = dict.fromkeys(validation["total"], 0)


def begin_validation(trainer: "Trainer") -> None:
    """Forget the first batch that `end_batch` has counted; within the validation."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.ready = total.started = total.processed


def go_on_behind_batch(trainer: "Trainer", validates: bool) -> None:
    """Have a restart that stands after a batch go on with validation, or the end of the epoch."""
    assign(trainer.fit_loop.epoch_loop.val_loop, "_has_run", not validates)


def step_plateau_schedulers(trainer: "Trainer") -> None:
    """Let `ReduceLROnPlateau` see the epoch that is over."""
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def go_to_step(trainer: "Trainer", epoch: int, step: int) -> None:
    """Have a Trainer that has begun its first epoch say that it is in another one, at some step."""
    trainer.fit_loop.epoch_progress.current.completed = epoch
    optimization: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    optimization.optim_progress.optimizer.step.total.completed = step
