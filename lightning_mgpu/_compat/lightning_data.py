"""What we need to know of the samplers that Lightning puts into dataloaders."""

from collections.abc import Iterator
from typing import Any

from lightning_mgpu._compat.lightning import (
    UnrepeatedDistributedSamplerWrapper,
    _DatasetSamplerWrapper,
    _IndexBatchSamplerWrapper,
)
from lightning_mgpu._compat.lightning_attributes import assign


def recorded_batches(batch_sampler: Any) -> tuple[Any, list[list[Any]]] | None:
    """The batch sampler that makes the batches, and the indices of those it has made.

    `None` of a batch sampler that Lightning does not listen to: it does so in `predict`.
    """
    if not isinstance(batch_sampler, _IndexBatchSamplerWrapper):
        return None
    return inner_batch_sampler(batch_sampler), batch_sampler.seen_batch_indices


def inner_batch_sampler(batch_sampler: Any) -> Any:
    """The batch sampler that Lightning listens to; `None` if it listens to none."""
    return getattr(batch_sampler, "_batch_sampler", None)


def set_inner_batch_sampler(batch_sampler: Any, inner: Any) -> None:
    """Have another one make the batches."""
    assign(batch_sampler, "_batch_sampler", inner)


def whole_sampler(sampler: UnrepeatedDistributedSamplerWrapper) -> Any:
    """The sampler whose samples Lightning's deals out to the ranks."""
    dataset: Any = sampler.dataset
    return dataset._sampler


def _samplers_within(sampler: Any) -> list[Any]:
    """The samplers that one takes from, as far as torch, Lightning and custom call them so."""
    names = ("sampler", "batch_sampler", "_sampler", "_batch_sampler")
    found = [getattr(sampler, name, None) for name in names]
    if isinstance(dataset := getattr(sampler, "dataset", None), _DatasetSamplerWrapper):
        found.append(dataset)
    return [part for part in found if part is not None]


def samplers_of(loader: Any) -> Iterator[Any]:
    """Samplers of a loader, and those that they take from."""
    found = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    seen: set[int] = set()
    while found:
        sampler = found.pop()
        if sampler is None or id(sampler) in seen:
            continue
        seen.add(id(sampler))
        yield sampler
        found += _samplers_within(sampler)
