"""Cut tensors into micro-batches, and put together what the micro-batches return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch import leaves, map_leaves

__all__: list[str] = []


class SplitError(ValueError):
    """A call cannot be split into micro-batches, or its outputs cannot be joined."""


def sizes(total: int, count: int, least: int = 1) -> list[int]:
    """The sizes of micro-batches, as even as can be.

    Args:
        total: Samples in the batch.
        count: How many micro-batches are wanted; a small batch makes fewer.
        least: The least samples in each, unless the whole batch has fewer.
    """
    count = max(1, min(count, total // least))
    base, more = divmod(total, count)
    return [base + (index < more) for index in range(count)]


def cut(
    tensors: Mapping[str, Tensor], split: frozenset[str], parts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """The tensors of each micro-batch; views.

    Args:
        tensors: By name.
        split: Those to be split; the others go to every micro-batch.
        parts: Samples in each micro-batch.
    """
    pieces = {name: torch.split(tensors[name], list(parts)) for name in split}
    return [
        {name: pieces[name][index] if name in split else t for name, t in tensors.items()}
        for index in range(len(parts))
    ]


@dataclass(frozen=True)
class Rows:
    """How a tensor of the output was joined: the rows of each; `None` if it is the first's."""

    counts: tuple[int, ...] | None

    def split(self, gradient: Tensor | None, count: int) -> list[Tensor | None]:
        """The gradient of each micro-batch's part."""
        if gradient is None:
            return [None] * count
        if self.counts is None:
            return [gradient, *[None] * (count - 1)]
        return list(torch.split(gradient, list(self.counts)))


def join(parts: Sequence[Any], counts: Sequence[int], whole: bool) -> tuple[Any, list[Rows]]:
    """Put a value of the output together.

    Args:
        parts: Of each micro-batch: a tensor, or a structure of such.
        counts: Samples in each micro-batch.
        whole: Whether it depends on nothing that was split, and so is the same everywhere.

    Returns:
        The value, and how each of its tensors was joined.

    Raises:
        SplitError: The parts do not make a batch.
    """
    columns = list(zip(*([leaf for _, leaf in leaves(part)] for part in parts), strict=True))
    joined, rows = [], []
    for column in columns:
        if isinstance(column[0], Tensor):
            tensor, how = _join_tensors(column, counts, whole)
            joined.append(tensor)
            rows.append(how)
        else:
            joined.append(_same(column, counts))
    remaining = iter(joined)
    return map_leaves(lambda _: next(remaining), parts[0]), rows


def _join_tensors(
    parts: Sequence[Tensor], counts: Sequence[int], whole: bool
) -> tuple[Tensor, Rows]:
    first = parts[0]
    if whole:
        return first, Rows(None)
    if first.dim() == 0:
        raise SplitError(
            "The module returns a tensor without dimensions, computed from one micro-batch. Return"
            " what has an entry per sample, and take the mean or the loss in the step."
        )
    factors = {
        part.shape[0] / count if count else 1.0 for part, count in zip(parts, counts, strict=True)
    }
    if len(factors) > 1 or not next(iter(factors)).is_integer() or _differ(parts):
        raise SplitError(
            "The module returns a tensor whose first dimension is not the batch: of micro-batches"
            f" of {list(counts)} samples it has made {[tuple(part.shape) for part in parts]}."
        )
    if len(parts) == 1:
        return first, Rows(None)
    return torch.cat(list(parts)), Rows(tuple(part.shape[0] for part in parts))


def _differ(parts: Sequence[Tensor]) -> bool:
    return any(part.shape[1:] != parts[0].shape[1:] for part in parts)


def _same(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) or part != first for part in parts) or (
        len(parts) > 1 and type(first) is int and first == counts[0]
    ):
        raise SplitError(
            f"The module returns {parts!r}, one for each micro-batch of {list(counts)} samples,"
            " which cannot be joined. Return tensors with an entry per sample."
        )
    return first
