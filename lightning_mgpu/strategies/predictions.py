"""Bring every rank's predictions together in the order of the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_mgpu.engine.batch import join_samples

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__: list[str] = []

_ARRAYS = (torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class RankPredictions:
    """One rank's share of what `Trainer.predict` returns.

    Attributes:
        outputs: What `predict_step` returned: dataloaders x batches. `None` if predictions are
            not kept.
        indices: The dataset index of each sample: dataloaders x batches x samples. Empty for a
            dataloader whose indices are not known (an `IterableDataset`).
        nested: Whether the caller expects a list per dataloader.
    """

    outputs: list[list[Any]] | None
    indices: list[list[list[int]]]
    nested: bool

    @classmethod
    def of(cls, trainer: "Trainer", returned: Any) -> "RankPredictions":
        """This rank's share, taken when `Trainer.predict` has just `returned`."""
        combined = trainer.predict_loop._combined_loader
        loaders = combined.flattened if combined is not None else []
        nested = len(loaders) != 1
        if not returned:
            return cls(None, [], nested)
        outputs = returned if nested else [returned]
        indices = []
        for loader, batches in zip(loaders, outputs, strict=True):
            seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", [])
            # DataLoader workers fetch ahead of `limit_predict_batches`.
            indices.append([list(batch) for batch in seen[: len(batches)]])
        return cls(outputs, indices, nested)


def merge_predictions(ranks: Sequence[RankPredictions]) -> Any:
    """The predictions of all ranks, as one process would have returned them.

    Samples are put in the order of the dataset and cut into batches of rank 0's batch size again.
    Two kinds of output cannot be: those of a dataset without indices, and those whose first
    dimension is not the batch or that differ in shape from batch to batch. They are returned batch
    by batch, ordered by their first index or else in turns of the ranks.

    Returns:
        A list of batches, or a list of such lists if there are several dataloaders. `None` if no
        rank kept predictions.
    """
    kept = [rank for rank in ranks if rank.outputs is not None]
    if not kept:
        return None
    merged = [
        _merge(
            [rank.outputs[loader] for rank in kept if rank.outputs is not None],
            [rank.indices[loader] for rank in kept],
        )
        for loader in range(len(kept[0].indices))
    ]
    return merged if kept[0].nested else merged[0]


def join_batches(batches: Sequence[Any]) -> Any:
    """Batched outputs joined along the batch; the list itself where they cannot be."""
    sizes = [size for batch in batches if (size := _batch_size(batch)) is not None]
    complete = batches and len(sizes) == len(batches)
    samples = join_samples(batches, sizes) if complete else None
    return list(batches) if samples is None else samples.joined


def _merge(outputs: list[list[Any]], indices: list[list[list[int]]]) -> list[Any]:
    if not all(len(i) == len(o) for i, o in zip(indices, outputs, strict=True)):
        return _in_turns(outputs)
    if len(indices) > 1 and all(other == indices[0] for other in indices[1:]):
        return outputs[0]  # not a distributed sampler: every rank has seen everything
    batches = [batch for rank in outputs for batch in rank]
    samples = [batch for rank in indices for batch in rank]
    sizes = [len(batch) for batch in samples]
    joined = join_samples(batches, sizes)
    if joined is None:
        rank_zero_warn(
            "`predict_step` returns something that cannot be taken apart by sample (its first"
            " dimension is not the batch, or batches differ in shape), so the predictions of the"
            " ranks are ordered batch by batch."
        )
        by_first_sample = sorted(range(len(batches)), key=lambda i: samples[i][:1])
        return [batches[i] for i in by_first_sample]
    # A sampler that pads repeats samples; the first of each is as good as the others.
    _, order = np.unique(np.concatenate([np.asarray(b, np.int64) for b in samples]), True)
    size = len(indices[0][0])
    return [joined.take(order[start : start + size]) for start in range(0, len(order), size)]


def _in_turns(outputs: list[list[Any]]) -> list[Any]:
    longest = max(len(rank) for rank in outputs)
    return [rank[i] for i in range(longest) for rank in outputs if i < len(rank)]


def _batch_size(output: Any) -> int | None:
    """The first dimension of an output's first array; `None` if it has none."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, _ARRAYS)]
    return len(leaves[0]) if leaves and leaves[0].ndim > 0 else None
