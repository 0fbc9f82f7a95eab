"""Bring every rank's predictions together in the order of the dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_mgpu.engine.batch import are_per_sample, rebuild_sequence

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
    sizes = [_batch_size(batch) for batch in batches]
    if not batches or None in sizes or not _can_join(batches, sizes):
        return list(batches)
    return _join(batches, sizes)


def _merge(outputs: list[list[Any]], indices: list[list[list[int]]]) -> list[Any]:
    if not all(len(i) == len(o) for i, o in zip(indices, outputs, strict=True)):
        return _in_turns(outputs)
    if len(indices) > 1 and all(other == indices[0] for other in indices[1:]):
        return outputs[0]  # not a distributed sampler: every rank has seen everything
    batches = [batch for rank in outputs for batch in rank]
    samples = [batch for rank in indices for batch in rank]
    sizes = [len(batch) for batch in samples]
    if not _can_join(batches, sizes):
        rank_zero_warn(
            "`predict_step` returns something that cannot be taken apart by sample (its first"
            " dimension is not the batch, or batches differ in shape), so the predictions of the"
            " ranks are ordered batch by batch."
        )
        by_first_sample = sorted(range(len(batches)), key=lambda i: samples[i][:1])
        return [batches[i] for i in by_first_sample]
    # A sampler that pads repeats samples; the first of each is as good as the others.
    _, order = np.unique(np.concatenate([np.asarray(b, np.int64) for b in samples]), True)
    joined = _join(batches, sizes)
    size = len(indices[0][0])
    return [_take(joined, order[start : start + size]) for start in range(0, len(order), size)]


def _in_turns(outputs: list[list[Any]]) -> list[Any]:
    longest = max(len(rank) for rank in outputs)
    return [rank[i] for i in range(longest) for rank in outputs if i < len(rank)]


def _batch_size(output: Any) -> int | None:
    """The first dimension of an output's first array; `None` if it has none."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, _ARRAYS)]
    return len(leaves[0]) if leaves and leaves[0].ndim > 0 else None


class _SampleList(list[Any]):
    """A list with one entry per sample (texts, boxes), rather than a list of batched arrays."""


def _can_join(batches: Sequence[Any], sizes: Sequence[Any]) -> bool:
    """Whether all outputs have one structure, with the batch as every array's first dimension."""
    first = batches[0]
    if not all(type(batch) is type(first) for batch in batches):
        return False
    if isinstance(first, _ARRAYS):
        return all(b.ndim > 0 and len(b) == n for b, n in zip(batches, sizes, strict=True)) and all(
            b.shape[1:] == first.shape[1:] and b.dtype == first.dtype for b in batches
        )
    if isinstance(first, Mapping):
        return all(batch.keys() == first.keys() for batch in batches) and all(
            _can_join([batch[key] for batch in batches], sizes) for key in first
        )
    if isinstance(first, (list, tuple)):
        return are_per_sample(batches, sizes) or (
            all(len(batch) == len(first) for batch in batches)
            and len(first) > 0
            and all(_can_join(column, sizes) for column in zip(*batches, strict=True))
        )
    return first is None


def _join(batches: Sequence[Any], sizes: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(batches))
    if isinstance(first, np.ndarray):
        return np.concatenate(list(batches))
    if isinstance(first, Mapping):
        return {key: _join([batch[key] for batch in batches], sizes) for key in first}
    if first is None:
        return None
    if are_per_sample(batches, sizes):
        return _SampleList(sample for batch in batches for sample in batch)
    return rebuild_sequence(first, [_join(column, sizes) for column in zip(*batches, strict=True)])


def _take(joined: Any, order: Any) -> Any:
    if isinstance(joined, torch.Tensor):
        return joined[torch.from_numpy(order)]
    if isinstance(joined, np.ndarray):
        return joined[order]
    if isinstance(joined, Mapping):
        return {key: _take(value, order) for key, value in joined.items()}
    if joined is None:
        return None
    if isinstance(joined, _SampleList):
        return [joined[i] for i in order]
    return rebuild_sequence(joined, [_take(value, order) for value in joined])
