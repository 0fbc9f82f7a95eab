"""Split the batches of one kind of step over replicas, and join its outputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_mgpu.engine.batch import (
    BatchLayout,
    Hint,
    JoinMemory,
    Shard,
    batch_size,
    join,
    split,
)
from lightning_mgpu.strategies.replicas.log_merging import BatchSizes

Scatter = Callable[[Any, int], Sequence[Shard]]
Gather = Callable[[Sequence[Any], Sequence[int]], Any]


class Sharding:
    """Split batches and join outputs, and remember their layout.

    Args:
        devices: One for each replica; joined tensors lie on the first.
        hint: What is known of the DataLoader.
        scatter_fn: The user's function in place of `split`.
        gather_fn: The user's function in place of `join`.

    Attributes:
        gather_fn: The same.
        batch_sizes: What was logged as `batch_size`.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        hint: Callable[[], Hint],
        scatter_fn: Scatter | None,
        gather_fn: Gather | None,
    ) -> None:
        self._devices = devices
        self._layout = BatchLayout(hint)
        self._memory = JoinMemory()
        self._scatter_fn, self.gather_fn = scatter_fn, gather_fn
        # Of a batch that `scatter_fn` has split, where shards may weigh by something else.
        self._samples: list[int] | None = None
        self.batch_sizes = BatchSizes()

    @property
    def doubts(self) -> list[str]:
        """Possible misinterpretations of the last batch, for messages."""
        return [] if self._scatter_fn is not None else self._layout.doubts

    def trial(self) -> "Sharding":
        """Copy for a trial run, which logs no warnings and keeps what it learns to itself."""
        trial = copy.copy(self)
        trial._memory = self._memory.silent()
        return trial

    def confirm(self, trial: "Sharding") -> None:
        """Take over a trial's way of joining outputs, which proved right."""
        self._memory = trial._memory

    def scatter(self, batch: Any, least: int = 1) -> list[Shard]:
        """The shards of a batch, at most one for each device.

        Args:
            batch: The whole batch.
            least: The least samples in a shard, unless the whole batch has fewer.

        Raises:
            TypeError: `scatter_fn` returns something else than shards.
            ValueError: The batch cannot be split, or `scatter_fn` makes too many shards.
        """
        if self._scatter_fn is not None:
            return self._scattered(batch, self._scatter_fn)
        count = len(self._devices)
        try:
            return split(batch, count, least, self._layout)
        except ValueError as error:
            raise ValueError(
                f"The batch cannot be split over {count} devices: {error} Give"
                " `DataParallelStrategy(scatter_fn=...)` a function that splits it;"
                " `functools.partial(lightning_mgpu.scatter, dim=1)` if the batch is the second"
                " dimension."
            ) from error

    def gather(self, outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
        """Join the shards' outputs into that of the whole batch.

        Args:
            outputs: What it has returned for each shard.
            sizes: What each of them weighs.

        Raises:
            ValueError: The outputs cannot be joined.
        """
        if all(output is None for output in outputs):
            return None
        if self.gather_fn is not None:
            return self.gather_fn(outputs, sizes)
        samples = self._samples if len(self._samples or ()) == len(sizes) else None
        try:
            return join(outputs, sizes, self._devices[0], self._memory, samples=samples)
        except ValueError as error:
            raise ValueError(
                f"The outputs of the replicas cannot be joined: {error} Give"
                " `DataParallelStrategy(gather_fn=...)` a function that joins them."
            ) from error

    def _scattered(self, batch: Any, scatter_fn: Scatter) -> list[Shard]:
        count = len(self._devices)
        shards = list(scatter_fn(batch, count))
        if not all(isinstance(shard, Shard) for shard in shards):
            raise TypeError(
                "`scatter_fn` must return a list of `lightning_mgpu.Shard(batch, size)`; it"
                f" returned {sorted({type(shard).__name__ for shard in shards})}."
            )
        if not 1 <= len(shards) <= count:
            raise ValueError(
                f"`scatter_fn` made {len(shards)} shards for {count} devices; return at least"
                " one and at most as many as there are devices."
            )
        self._samples = _samples_of(shards, batch)
        return shards


def _samples_of(shards: Sequence[Shard], batch: Any) -> list[int] | None:
    """Sizes of shards made by a user's function, which may weigh by something else."""
    try:
        samples = [batch_size(shard.batch) for shard in shards]
        return samples if sum(samples) == batch_size(batch) else None  # or split otherwise
    except ValueError:
        return None
