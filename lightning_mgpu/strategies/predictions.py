"""Bring every rank's predictions together in the order of the sampler."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_mgpu.engine.batch import are_per_sample, rebuild_sequence
from lightning_mgpu.strategies.dealing import LoaderOrder, chunks

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
        orders: Where these stand in the order of one process, for each dataloader.
        nested: Whether the caller expects a list per dataloader.
    """

    outputs: list[list[Any]] | None
    orders: list[LoaderOrder]
    nested: bool

    @classmethod
    def of(cls, trainer: "Trainer", returned: Any) -> "RankPredictions":
        """This rank's share, taken when `Trainer.predict` has just `returned`."""
        combined = trainer.predict_loop._combined_loader
        loaders = combined.flattened if combined is not None else []
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
    """The predictions of all ranks, as one process would have returned them.

    Samples come in the order of the sampler, in batches of the sizes that the batch sampler makes;
    padding is dropped. What cannot be taken apart by sample (its first dimension is not the batch,
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
    sizes = [_batch_size(batch) for batch in batches]
    if not batches or None in sizes or not _can_join(batches, sizes):
        return list(batches)
    return _join(batches, sizes)


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
    """The places of samples in the order of the dataset, and the sizes of its batches."""
    flat = np.asarray([i for rank in indices for batch in rank for i in batch])
    if len(np.unique(flat)) < len(flat):
        rank_zero_warn(
            "The sampler of the predict dataloader gives some samples more than once, and deals"
            " samples out to the ranks by a rule of its own, so padding cannot be told from"
            " repetition: the predictions of all are returned, in the order of the dataset."
        )
    position = iter(np.argsort(np.argsort(flat, kind="stable"), kind="stable").tolist())
    places = [[[next(position) for _ in batch] for batch in rank] for rank in indices]
    return places, chunks(len(flat), max(len(batch) for batch in indices[0]))


def _arrange(batches: list[Any], places: list[list[int]], sizes: list[int]) -> list[Any]:
    """Batches of `sizes` from others, whose samples have these `places` among the new ones."""
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
    lengths = [len(batch) for batch in places]
    if not _can_join(batches, lengths):
        rank_zero_warn(
            "`predict_step` returns something that cannot be taken apart by sample (its first"
            " dimension is not the batch, or batches differ in shape), so the predictions of the"
            " ranks are ordered batch by batch."
        )
        return batches
    joined, flat = _join(batches, lengths), np.asarray([i for batch in places for i in batch])
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] < total]
    cuts = np.searchsorted(flat[order], ends[:-1])
    return [_take(joined, part) for part in np.split(order, cuts) if len(part)]


def _in_turns(outputs: list[list[Any]]) -> list[Any]:
    longest = max(len(rank) for rank in outputs)
    return [rank[i] for i in range(longest) for rank in outputs if i < len(rank)]


def _batch_size(output: Any) -> int | None:
    """The first dimension of an output's first array; `None` if it has none."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, _ARRAYS)]
    return len(leaves[0]) if leaves and leaves[0].ndim > 0 else None


class _Samples(list[Any]):
    """Entries for each sample (texts, boxes), rather than a list of batched arrays.

    Args:
        entries: Those of all batches.
        kind: What each batch had them in.
    """

    def __init__(self, entries: Iterable[Any], kind: type[list[Any] | tuple[Any, ...]]) -> None:
        super().__init__(entries)
        self.kind = kind


def _has_samples(batches: Sequence[Any], sizes: Sequence[Any]) -> bool:
    """Whether these have an entry per sample; torch's own collation makes tuples of texts."""
    if type(batches[0]) is not tuple:
        return are_per_sample(batches, sizes)
    return are_per_sample([list(batch) for batch in batches], sizes) and not any(
        isinstance(leaf, (*_ARRAYS, int, float, complex)) for leaf in tree_leaves(list(batches))
    )


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
        return _has_samples(batches, sizes) or (
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
    if _has_samples(batches, sizes):
        return _Samples((sample for batch in batches for sample in batch), type(first))
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
    if isinstance(joined, _Samples):
        return joined.kind(joined[i] for i in order)
    return rebuild_sequence(joined, [_take(value, order) for value in joined])
