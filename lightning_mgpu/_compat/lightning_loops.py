"""What we need of the private state of a Trainer's loops."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning import _Loop
from lightning_mgpu._compat.lightning_attributes import assign, replaced

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer


def set_live_state_aside(trainer: "Trainer", stack: ExitStack) -> None:
    """For as long as `stack` lasts, take away what every run makes anew on each rank.

    Optimizer state may be twice the model's size, iterators hold live processes.
    """
    aside = replaced(
        trainer.strategy, _optimizers=[], _lightning_optimizers=[], lr_scheduler_configs=[]
    )
    stack.enter_context(aside)
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    evaluation = (val_loop, trainer.validate_loop, trainer.test_loop)
    for loop in (trainer.fit_loop, *evaluation, trainer.predict_loop):
        stack.enter_context(replaced(loop, _combined_loader=None, _data_fetcher=None))
        # The data of an earlier call; that of the coming one is among the arguments.
        stack.enter_context(replaced(loop._data_source, instance=None))
    stack.enter_context(replaced(trainer.predict_loop, _predictions=[]))


def progress_of(trainer: "Trainer") -> dict[str, Any]:
    """How far a Trainer is: its stage, epoch, steps, batch, and names logged in the current loop.

    May be called from another thread than the Trainer's.
    """
    loop = trainer._active_loop
    if loop is None:
        return {"stage": "setup"}
    stage = trainer.state.stage
    batches = trainer.fit_loop.epoch_loop if trainer.training else loop
    progress = getattr(batches, "batch_progress", None)
    told = {
        "stage": stage.value if stage is not None else "setup",
        "epoch": trainer.current_epoch,
        "global step": trainer.global_step,
        "batches begun": progress.current.ready if progress is not None else None,
        "logged": ", ".join(list(trainer._results or ())) or "nothing",
    }
    return {name: value for name, value in told.items() if value is not None}


def predict_loaders(trainer: "Trainer") -> list[Any]:
    """The dataloaders of a `predict` that is just over."""
    combined = trainer.predict_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def forget_restart(loop: _Loop) -> None:
    """Take back what `load_state_dict` concludes: the next run starts, and does not go on."""
    for name in ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint"):
        assign(loop, name, False)
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            forget_restart(child)


def forget_loader_states(trainer: "Trainer") -> None:
    """Take back the states of dataloaders that a checkpoint of the fit loop has brought."""
    assign(trainer.fit_loop, "_combined_loader_states_to_load", [])


def is_epoch_trained(trainer: "Trainer") -> bool:
    """Whether the epoch's last batch is being trained, or has been."""
    return trainer.fit_loop.epoch_loop._is_training_done
