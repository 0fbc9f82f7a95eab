"""Merge the predictions of all ranks in the order of the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_mgpu._compat.lightning_loops import predict_loaders
from lightning_mgpu._compat.torch import tree_leaves
from lightning_mgpu.engine.batch import join_samples
from lightning_mgpu.strategies.ranks.sample_dealing import LoaderOrder, chunks

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer

_ARRAYS = (torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class RankPredictions:
    """One rank's share of what `Trainer.predict` returns.

    Attributes:
        outputs: What `predict_step` returned: dataloaders x batches. `None` if predictions are
            not kept.
        orders: Where these stand in the order of one process, for each dataloader.
        nested: Whether the caller expects a list per dataloader.
    """

    outputs: list[list[Any]] | None
    orders: list[LoaderOrder]
    nested: bool

    @classmethod
    def of(cls, trainer: "Trainer", returned: Any) -> "RankPredictions":
        """This rank's share, called when `Trainer.predict` has just `returned`."""
        loaders = predict_loaders(trainer)
        nested = len(loaders) != 1
        if not returned:
            return cls(None, [], nested)
        outputs, limit = returned if nested else [returned], trainer.limit_predict_batches
        orders = [
            LoaderOrder.of(loader, len(batches), limit)
            for loader, batches in zip(loaders, outputs, strict=True)
        ]
        return cls(outputs, orders, nested)


def merge_predictions(ranks: Sequence[RankPredictions]) -> Any:
    """Merge the predictions of all ranks into those of one process.

    Samples come in the order of the sampler, in batches of the sizes that the batch sampler makes;
    padding is dropped. What cannot be split by sample (its first dimension is not the batch,
    or batches differ in shape) is returned batch by batch, with a warning. Predictions from a
    sampler that deals samples out by a rule of its own come in the order of the dataset, those of
    an `IterableDataset` in turns of the ranks.

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
            [rank.orders[loader] for rank in kept],
        )
        for loader in range(len(kept[0].orders))
    ]
    return merged if kept[0].nested else merged[0]


def join_batches(batches: Sequence[Any]) -> Any:
    """Batched outputs joined along the batch; the list itself where they cannot be."""
    sizes = [size for batch in batches if (size := _batch_size(batch)) is not None]
    complete = batches and len(sizes) == len(batches)
    samples = join_samples(batches, sizes) if complete else None
    return list(batches) if samples is None else samples.joined


def _merge(outputs: list[list[Any]], orders: list[LoaderOrder]) -> list[Any]:
    known_by = {order.known_by for order in orders}
    if known_by == {"everything"}:
        return outputs[0]
    places = [order.batches for order in orders]
    if known_by == {"position"}:
        sizes = orders[0].sizes
    elif known_by != {"dataset"}:
        return _in_turns(outputs)
    elif all(sorted(chain(*rank)) == sorted(chain(*places[0])) for rank in places):
        return outputs[0]  # not a distributed sampler: every rank has seen everything
    else:
        places, sizes = _by_index(places)
    return _arrange(
        [batch for rank in outputs for batch in rank],
        [batch for rank in places for batch in rank],
        sizes,
    )


def _by_index(indices: list[list[list[int]]]) -> tuple[list[list[list[int]]], list[int]]:
    """Places of samples in the dataset's order, and the sizes of its batches."""
    flat = np.asarray([i for rank in indices for batch in rank for i in batch])
    if len(np.unique(flat)) < len(flat):
        rank_zero_warn(
            "The sampler of the predict dataloader gives some samples more than once, and"
            " distributes them to the ranks by its own rule, so padding cannot be"
            " distinguished from repetition: all predictions are returned, in the order of"
            " the dataset."
        )
    position = iter(np.argsort(np.argsort(flat, kind="stable"), kind="stable").tolist())
    places = [[[next(position) for _ in batch] for batch in rank] for rank in indices]
    return places, chunks(len(flat), max(len(batch) for batch in indices[0]))


def _arrange(batches: list[Any], places: list[list[int]], sizes: list[int]) -> list[Any]:
    """Rearrange batches into batches of `sizes`; `places` are the samples' new positions."""
    ends = list(accumulate(sizes))
    total = ends[-1] if ends else 0
    # Batches of nothing but padding stay out.
    kept = sorted(
        (i for i, batch in enumerate(places) if min(batch, default=total) < total),
        key=lambda i: min(places[i]),
    )
    batches, places = [batches[i] for i in kept], [places[i] for i in kept]
    whole = {(end - size, end) for end, size in zip(ends, sizes, strict=True)}
    if all((p[0], p[-1] + 1) in whole and p == list(range(p[0], p[-1] + 1)) for p in places):
        return batches
    joined = join_samples(batches, [len(batch) for batch in places])
    if joined is None:
        rank_zero_warn(
            "The return value of `predict_step` cannot be split by sample (its first"
            " dimension is not the batch, or batches differ in shape), so the predictions of"
            " the ranks are ordered batch by batch."
        )
        return batches
    flat = np.asarray([i for batch in places for i in batch])
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] < total]
    cuts = np.searchsorted(flat[order], ends[:-1])
    return [joined.take(part) for part in np.split(order, cuts) if len(part)]


def _in_turns(outputs: list[list[Any]]) -> list[Any]:
    longest = max(len(rank) for rank in outputs)
    return [rank[i] for i in range(longest) for rank in outputs if i < len(rank)]


def _batch_size(output: Any) -> int | None:
    """The first dimension of an output's first array; `None` if it has none."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, _ARRAYS)]
    return len(leaves[0]) if leaves and leaves[0].ndim > 0 else None
