"""Split a batch into shards."""

from typing import Any, NamedTuple

from lightning_mgpu.engine.batch.layout import BatchLayout, Dimensions


class Shard(NamedTuple):
    """A part of a batch.

    Attributes:
        batch: Of the same structure as the whole.
        size: Number of samples; what the shard weighs in means.
    """

    batch: Any
    size: int


def split(batch: Any, count: int, least: int = 1, layout: BatchLayout | None = None) -> list[Shard]:
    """Split a batch into at most `count` shards, as even as can be.

    Tensors and arrays are split along their batch dimension, lists and tuples with an entry per
    sample by entries. All else goes to every shard as it is.

    Args:
        batch: The whole batch.
        count: How many shards are wanted; a small batch makes fewer.
        least: The least samples in a shard, unless the whole batch has fewer.
        layout: What is known of batches of this kind; default: nothing.

    Returns:
        The shards in order; tensors are views.

    Raises:
        ValueError: As for `BatchLayout.read`.
    """
    layout = layout or BatchLayout()
    size = layout.read(batch)
    if size == 0:
        return [Shard(batch, 0)]
    count = min(count, max(1, size // least))
    base, more = divmod(size, count)
    shards, start = [], 0
    for index in range(count):
        stop = start + base + (index < more)
        shards.append(Shard(layout.cut(batch, start, stop), stop - start))
        start = stop
    return shards


def batch_size(batch: Any) -> int:
    """The number of samples in a batch.

    Raises:
        ValueError: As for `BatchLayout.read`.
    """
    return BatchLayout().read(batch)


def scatter(batch: Any, count: int, dim: Dimensions = 0) -> list[Shard]:
    """Split a batch along another dimension: ``scatter_fn=partial(scatter, dim=1)``.

    Args:
        batch: The whole batch.
        count: How many shards are wanted.
        dim: The batch dimension of tensors that have that many dimensions, such as 1 for
            ``[time, batch, features]``; for all of them, or by key or position in the batch:
            ``{"tokens": 1}``. Other tensors have it first.

    Returns:
        The shards in order; tensors are views.

    Raises:
        ValueError: Two tensors disagree about the number of samples.
    """
    return split(batch, count, layout=BatchLayout(dim=dim))
