"""Distribute the samples of `Trainer.predict` to ranks, and record their positions.

One process takes batches from the batch sampler, which takes samples from the sampler. The ranks
take turns at the samples, as Lightning deals them (batch size 2, two ranks)::

    sampler         5  3  8  1  9  0  7         positions 0 to 6
    one process    [5  3][8  1][9  0][7]
    rank 0         [5     8]   [9     7]        positions 0 2, 4 6
    rank 1         [   3     1]   [0]           positions 1 3, 5

The batches that a batch sampler of the user's own makes are dealt out whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal
from unittest.mock import patch

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    _IndexBatchSamplerWrapper,
)
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_Broadcast = Callable[[Any], Any]

# These give rank r the positions r, r + n, r + 2n, ... of n ranks, and pad at the end.
_IN_TURNS = {
    kind.__iter__
    for kind in (
        *(DistributedSampler, DistributedSamplerWrapper),
        *(UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper),
    )
}
_OF_ONE_PROCESS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class LoaderOrder:
    """Positions of the samples of one rank's batches in the order of one process.

    Attributes:
        known_by: What is known: the ``"position"`` of each sample, its index in the ``"dataset"``,
            that every rank was given ``"everything"``, or ``"nothing"``.
        batches: Batches x samples: these positions or indices. Positions from `sum(sizes)` on are
            padding.
        sizes: The number of samples in each batch of one process.
    """

    known_by: Literal["position", "dataset", "everything", "nothing"]
    batches: list[list[int]]
    sizes: list[int]

    @classmethod
    def of(cls, loader: Any, count: int, limit: float = 1.0) -> "LoaderOrder":
        """The order of the first `count` batches that `loader` gave this rank.

        Args:
            loader: Any object, as the predict loop has used it.
            count: The number of batches.
            limit: The Trainer's `limit_predict_batches`.
        """
        batch_sampler, sampler = getattr(loader, "batch_sampler", None), _sampler_of(loader)
        sizes, size, is_plain = [1] * count, 1, True
        if isinstance(batch_sampler, _IndexBatchSamplerWrapper):
            inner = batch_sampler._batch_sampler
            if isinstance(inner, _SharedBatches) and inner.order is not None:
                return cls("position", inner.order.batches[:count], inner.order.sizes)
            # DataLoader workers fetch ahead of `limit_predict_batches`.
            seen = [list(batch) for batch in batch_sampler.seen_batch_indices[:count]]
            is_plain = type(inner) is BatchSampler
            sizes, size = [len(batch) for batch in seen], getattr(inner, "batch_size", 1)
        elif batch_sampler is not None:
            return cls("nothing", [], [])
        if is_plain and isinstance(sampler, DistributedSampler) and _deals_in_turns(sampler):
            return cls.of_turns(sampler, sizes, size, limit)
        if is_plain and type(sampler) in _OF_ONE_PROCESS:
            return cls("everything", [], [])
        if batch_sampler is None or len(seen) != count:
            return cls("nothing", [], [])
        return cls("dataset", seen, [])

    @classmethod
    def of_turns(
        cls, sampler: DistributedSampler[Any], sizes: list[int], size: int, limit: float
    ) -> "LoaderOrder":
        """Order of batches of `sizes`, where one process makes batches of `size` samples."""
        samples: Any = sampler.dataset
        total = samples.total if isinstance(samples, _SharedOrder) else len(samples)
        if isinstance(limit, int):
            total = min(total, limit * size)
        turn, of = sampler.rank, sampler.num_replicas
        ends = list(accumulate(sizes))
        batches = [
            list(range(turn + (end - length) * of, turn + end * of, of))
            for end, length in zip(ends, sizes, strict=True)
        ]
        return cls("position", batches, chunks(total, size))


def deal_out(loader: Any, limit: float, broadcast: _Broadcast) -> None:
    """Make the ranks' shares of a loader add up to the batches of one process.

    Each rank would draw an order of its own from a sampler that shuffles, unless all are seeded: it
    takes rank 0's. To be called on all ranks, with what Lightning has made of the user's loader.

    Args:
        loader: Any object; only a loader with Lightning's sampler for predictions is changed.
        limit: The Trainer's `limit_predict_batches`. A number of batches is that of all ranks
            together.
        broadcast: Gives every rank what rank 0 gives it.
    """
    sampler = _sampler_of(loader)
    if type(sampler) is not UnrepeatedDistributedSamplerWrapper:
        return
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "_batch_sampler", None)
    dataset: Any = sampler.dataset
    order = _SharedOrder(dataset._sampler, sampler.num_replicas, broadcast)
    most = limit if isinstance(limit, int) else None
    if batch_sampler is None or type(inner) is BatchSampler:
        order.cut(most if most is None else most * getattr(inner, "batch_size", 1))
        _set_order(sampler, order)
        return
    _set_order(sampler, order)
    batch_sampler._batch_sampler = _SharedBatches(inner, sampler, order, most, broadcast)


def chunks(total: int, size: int) -> list[int]:
    """The sizes of batches of `size` samples, of which the last may have fewer."""
    return [min(size, total - start) for start in range(0, total, size)]


class _SharedOrder:
    """The samples of a sampler, in the order in which rank 0 has drawn them.

    Stands for the dataset of Lightning's `UnrepeatedDistributedSamplerWrapper`. With fewer samples
    than ranks it repeats them: each rank needs a batch, since a rank without any skips all hooks.

    Attributes:
        total: The number of samples without repetitions.
        was_read: Whether somebody has asked for the samples.
    """

    def __init__(self, sampler: Any, world_size: int, broadcast: _Broadcast) -> None:
        self._sampler = sampler
        self._world_size = world_size
        self._broadcast = broadcast
        self._indices: list[Any] | None = None
        self.was_read = False
        self.total = len(sampler)

    def cut(self, most: int | None) -> None:
        """Limit to the first `most` samples."""
        self.total = self.total if most is None else min(self.total, most)

    def reset(self) -> None:
        """Start an iteration."""
        self.was_read, self._indices = True, None

    def __getitem__(self, position: int) -> Any:
        if self._indices is None:
            self._indices = self._drawn()  # not before one process would
        return self._indices[position % self.total]

    def _drawn(self) -> list[Any]:
        indices = list(self._sampler)  # on all ranks, so that their generators stay in step
        if type(self._sampler) is not SequentialSampler:
            indices = self._broadcast(indices)
        return indices[: self.total]

    def __len__(self) -> int:
        return max(self.total, self._world_size) if self.total else 0


class _SharedBatches:
    """Batches of the user's batch sampler, distributed to the ranks in turns.

    Args:
        batch_sampler: Made anew by Lightning, with `sampler`.
        sampler: Deals samples out to ranks, and is made to give all of them here.
        order: What it deals out.
        most: Batches in all; `None`: as many as there are.
        broadcast: As of `deal_out`.

    Attributes:
        order: Where this rank's batches stand. `None` before the first iteration, and of a batch
            sampler that made its batches when it was made itself: these are the rank's share.
    """

    def __init__(
        self,
        batch_sampler: Any,
        sampler: UnrepeatedDistributedSamplerWrapper,
        order: _SharedOrder,
        most: int | None,
        broadcast: _Broadcast,
    ) -> None:
        self._batch_sampler, self._sampler, self._samples = batch_sampler, sampler, order
        self._most, self._broadcast = most, broadcast
        self.order: LoaderOrder | None = None
        share = len(batch_sampler)
        with self._of_one_process():
            whole = len(batch_sampler)
        self._length = share if whole == share else len(self._turns(whole))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self._samples.was_read = False
        with self._of_one_process():
            batches = list(self._batch_sampler)
        if not self._samples.was_read:
            yield from batches
            return
        batches = self._broadcast(batches)
        turns = self._turns(len(batches))
        if len(turns) > self._length:
            raise ValueError(
                f"`{type(self._batch_sampler).__name__}` makes {len(batches)} batches, of"
                f" which this rank has {len(turns)}, but its `__len__` gives {self._length}."
                " Make `__len__` count the batches that `__iter__` makes of `self.sampler`."
            )
        sizes = [len(batch) for batch in batches[: self._most]]
        starts = [0, *accumulate(sizes)]
        places = []
        for turn in turns:
            start = starts[min(turn, len(sizes))]  # padding: behind all others
            places.append(list(range(start, start + sizes[turn % len(sizes)])))
        self.order = LoaderOrder("position", places, sizes)
        yield from (batches[turn % len(sizes)] for turn in turns)

    def _turns(self, count: int) -> range:
        """Indices of this rank's batches; those from `count` on repeat earlier ones."""
        turn, of = self._sampler.rank, self._sampler.num_replicas
        count = count if self._most is None else min(count, self._most)
        return range(turn, max(count, of) if count else 0, of)

    @contextmanager
    def _of_one_process(self) -> Iterator[None]:
        count = self._samples.total
        dealt: dict[str, Any] = {
            "num_replicas": 1,
            "rank": 0,
            "total_size": count,
            "num_samples": count,
        }
        with (
            patch.multiple(self._sampler, **dealt),
            patch.object(self._samples, "_world_size", 1),
        ):
            yield


def _set_order(sampler: UnrepeatedDistributedSamplerWrapper, order: _SharedOrder) -> None:
    sampler.dataset = order  # type: ignore[assignment]
    sampler.shuffle = False  # the user's sampler has done so
    sampler.total_size = len(order)
    sampler.num_samples = len(range(sampler.rank, len(order), sampler.num_replicas))


def _sampler_of(loader: Any) -> Any:
    """Sampler under any attribute of a loader's batch sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:
        return getattr(loader, "sampler", None)
    held = vars(batch_sampler) if hasattr(batch_sampler, "__dict__") else {}
    dealt = (value for value in held.values() if isinstance(value, DistributedSampler))
    return next(dealt, held.get("sampler"))


def _deals_in_turns(sampler: DistributedSampler[Any]) -> bool:
    return type(sampler).__iter__ in _IN_TURNS
