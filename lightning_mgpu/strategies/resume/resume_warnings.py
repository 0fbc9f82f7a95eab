"""What is told of a run that cannot go on exactly."""

from typing import Any

from lightning_mgpu._compat.lightning import (
    LightningModule,
    StochasticWeightAveraging,
    Trainer,
    is_overridden,
    rank_zero_warn,
)
from lightning_mgpu.engine.data_parallel.copying.generators import KINDS as GENERATORS
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.resume.resumable_loader import ResumableLoader


def of_rank(state: dict[str, Any], trainer: Trainer) -> dict[str, Any] | None:
    """What a checkpoint has of this rank; `None`, with a warning, if that is not enough."""
    there = state.get("world_size", 0)
    if not there:
        why = "was written without `ExactResume`"
    elif there != trainer.world_size:
        why = f"was written by {there} ranks, not {trainer.world_size} (resume with {there})"
    elif len(state["ranks"]) < there:
        why = f"was written by one of {there} ranks alone, when it was interrupted"
    else:
        known: dict[str, Any] = state["ranks"][str(trainer.global_rank)]
        return known
    rank_zero_warn(
        f"The checkpoint {why}: training goes on from it as Lightning does, with other random"
        " numbers, and from the first batch of the loader's order."
    )
    return None


def warn_of_hook(model: LightningModule) -> None:
    """Tell of what a LightningModule does for a batch after checkpoints of it are written."""
    if is_overridden("on_train_batch_end", model):
        rank_zero_warn(
            f"`{type(model).__name__}.on_train_batch_end` runs after a checkpoint of the batch has"
            " been written, and not when the run is resumed from it: what it changes for that one"
            " batch is lost. Do it in a callback's `on_train_batch_end`, which runs before."
        )


def warn_of_loaders(trainer: Trainer, loader: ResumableLoader, used: int) -> None:
    """Tell of loaders whose batches will be others than before.

    Args:
        trainer: The Trainer.
        loader: What it draws from.
        used: How many batches of the epoch have been trained.
    """
    if trainer.current_epoch > 0 and any(
        getattr(part, "persistent_workers", False) for part in loader.flattened
    ):
        rank_zero_warn(
            "The DataLoader's workers live on from epoch to epoch (`persistent_workers=True`) and"
            " their random numbers with them: augmentations in workers will not be the same after"
            " the resume. Leave `persistent_workers` out."
        )
    if used and loader.has_cycles:
        rank_zero_warn(
            "The shorter of several DataLoaders begins anew within the epoch: its order will not be"
            " the same after the resume. Combine them in another mode, or give it a sampler with a"
            " generator of its own."
        )


def warn_of_callbacks(trainer: Trainer) -> None:
    """Tell of callbacks that do not save what they know."""
    if any(isinstance(each, StochasticWeightAveraging) for each in callbacks_of(trainer)):
        rank_zero_warn(
            "`StochasticWeightAveraging` does not save all that it knows: the run will not go on"
            " exactly. Use `EMAWeightAveraging`, or another `WeightAveraging`."
        )


def warn_of_generators(trainer: Trainer, loader: ResumableLoader) -> None:
    """Tell of generators that the program has made, and that nobody saves."""
    model = trainer.lightning_module
    holders = [*model.modules(), getattr(trainer, "datamodule", None)]
    holders += [getattr(part, "dataset", None) for part in loader.flattened]
    saved = {id(generator) for generator in loader.generators()}
    names = sorted(
        f"{type(holder).__name__}.{name}"
        for holder in holders
        for name, value in getattr(holder, "__dict__", {}).items()
        if isinstance(value, GENERATORS) and id(value) not in saved
    )
    if names:
        rank_zero_warn(
            f"The random generators {', '.join(names)} are not saved, and begin anew: what they"
            " draw will not be the same after the resume. Save their states in the `state_dict` of"
            " a callback or datamodule, or draw from torch's, NumPy's or Python's own."
        )


def warn_of_half_a_batch() -> None:
    """Tell that the checkpoint's random states are of a moment that is not reached again."""
    rank_zero_warn(
        "The checkpoint was written in the middle of a batch, which is computed again, with other"
        " random numbers if it draws any."
    )


def warn_of_stop() -> None:
    """Tell why the run ends."""
    rank_zero_warn(
        "The run had been told to stop when the checkpoint was written, as by `EarlyStopping`, and"
        " ends here. To go on all the same, resume without `ExactResume`."
    )
