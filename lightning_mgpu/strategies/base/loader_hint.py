"""Batch sizes and collation of the Trainer's DataLoaders."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import default_collate

from lightning_mgpu.engine.batch import Hint

_LOADERS = {
    "training_step": "train_dataloader",
    "validation_step": "val_dataloaders",
    "test_step": "test_dataloaders",
    "predict_step": "predict_dataloaders",
}


def loader_hint(trainer: Trainer, step: str) -> Hint:
    """Return the batch sizes, and whether torch's own collation makes the batches.

    Args:
        trainer: Whose loaders they are.
        step: The method that gets the batches, such as ``training_step``.
    """
    loaders = list(_flat(getattr(trainer, _LOADERS[step])))
    sizes = [size for loader in loaders for size in _sizes(loader)]
    changed = any(
        is_overridden("on_before_batch_transfer", owner)
        for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None))
        if owner is not None
    )
    collated = all(getattr(loader, "collate_fn", None) is default_collate for loader in loaders)
    return Hint(frozenset(sizes), bool(loaders) and collated and not changed)


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _flat(loader)
    elif loaders is not None:
        yield loaders


def _sizes(loader: Any) -> Iterator[int]:
    """The sizes of a loader's batches, the last one's included."""
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    if not isinstance(size, int):
        return
    try:
        samples = len(loader.sampler)
    except (AttributeError, TypeError):  # an `IterableDataset`
        yield size
        return
    yield min(size, samples)
    if samples > size and samples % size:
        yield samples % size
