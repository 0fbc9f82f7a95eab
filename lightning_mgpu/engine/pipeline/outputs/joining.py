"""Join output tensors of the micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mgpu.engine.batch import weighted_mean
from lightning_mgpu.engine.pipeline.microbatch import SplitError


@dataclass(frozen=True)
class OutputLayout:
    """Batch dimension of an output tensor.

    Attributes:
        dim: The dimension, whose length is the number of samples or a multiple of it; `None` if
            the tensor is the same for every micro-batch, or a number.
        mean: Whether it is a number that is a mean over samples.
        total: Whether it is a number that is a sum over them.
        entries: Whether it is a list with an entry per sample.
        minor: Of a multiple, whether neighbours belong to different samples, as in
            ``torch.cat([z, -z])``; otherwise a sample's entries lie side by side.
    """

    dim: int | None
    minor: bool = False
    mean: bool = False
    total: bool = False
    entries: bool = False


class Undecided(Exception):
    """A number was the same for every micro-batch, so it may be a mean or a sum."""


Layouts = Mapping[str, OutputLayout]
"""By the place in the output, such as ``output['logits']``."""

FIRST = OutputLayout(0)
MEAN = OutputLayout(None, mean=True)
TOTAL = OutputLayout(None, total=True)
ENTRIES = OutputLayout(0, entries=True)


@dataclass(frozen=True)
class Rows:
    """Record of how an output tensor was joined, to split its gradient.

    Attributes:
        counts: The entries of each micro-batch's part; `None` if it is the tensor of one of them.
        layout: Where the batch lies.
        owner: Whose tensor it is.
    """

    counts: tuple[int, ...] | None
    layout: OutputLayout = FIRST
    owner: int = 0

    def split(self, gradient: Tensor | None, count: int) -> list[Tensor | None]:
        """The gradient of each micro-batch's part."""
        if gradient is None:
            return [None] * count
        if self.layout.mean and self.counts is not None:
            return [gradient * (n / sum(self.counts)) for n in self.counts]
        if self.layout.total and self.counts is not None:
            return [gradient] * count
        if self.counts is None:
            return [gradient if chunk == self.owner else None for chunk in range(count)]
        dim = self.layout.dim
        assert dim is not None
        if not self.layout.minor:
            return list(torch.split(gradient, list(self.counts), dim))
        blocks = _blocks(gradient, dim, sum(self.counts))
        return [p.flatten(dim, dim + 1) for p in torch.split(blocks, list(self.counts), dim + 1)]


def cat(
    parts: Sequence[Tensor], counts: Sequence[int], layout: OutputLayout
) -> tuple[Tensor, Rows]:
    """Join tensors along the batch.

    Args:
        parts: Of each micro-batch.
        counts: Samples in each.
        layout: Where the batch lies; `parts` fit it.
    """
    dim = layout.dim
    if layout.mean and len(parts) > 1:
        return weighted_mean(parts, counts), Rows(tuple(counts), layout)
    if layout.total and len(parts) > 1:
        return torch.stack(list(parts)).sum(0), Rows(tuple(counts), layout)
    if dim is None or len(parts) == 1:
        return parts[0], Rows(None)
    if not layout.minor:
        return torch.cat(list(parts), dim), Rows(tuple(p.shape[dim] for p in parts), layout)
    blocks = [_blocks(part, dim, n) for part, n in zip(parts, counts, strict=True)]
    return torch.cat(blocks, dim + 1).flatten(dim, dim + 1), Rows(tuple(counts), layout)


def _blocks(tensor: Tensor, dim: int, count: int) -> Tensor:
    """Split a dimension into two, the second of which is the batch."""
    return tensor.reshape(*tensor.shape[:dim], -1, count, *tensor.shape[dim + 1 :])


def join(
    parts: Sequence[Tensor],
    counts: Sequence[int],
    path: str,
    layouts: Layouts | None = None,
    guess: bool = True,
) -> tuple[Tensor, Rows]:
    """Put a tensor of the output together.

    Args:
        parts: Of each micro-batch.
        counts: Samples in each micro-batch.
        path: What to call the tensor.
        layouts: Where the batch lies in the output, as far as that has been found out; `None` if a
            first dimension that is a multiple of the batch's is good enough.
        guess: Whether to take for a mean what has not been found out to be one.

    Returns:
        The tensor, and how it was joined.

    Raises:
        SplitError: The parts do not make a batch.
        Undecided: `guess` is wrong, and it would be needed.
    """
    first = parts[0]
    if len(parts) == 1:
        return first, Rows(None)
    layout = FIRST if layouts is None and _fits(parts, counts, 0) else None
    layout = (layouts or {}).get(path, layout)
    if layout is None or (layout.dim or 0) >= max(first.dim(), 1):
        layout = _guess(parts, counts, path)
    elif layout == OutputLayout(None):
        if any(not torch.equal(part, first) for part in parts[1:]):
            if not is_number(first):
                raise SplitError(unjoinable(path, first))
            if not guess:
                raise Undecided(path)
            layout = MEAN
        else:
            # A loss may be the same for all samples by chance, as that of a head of zeros is. Each
            # micro-batch gets its share of the gradient, which is right for a mean and for what
            # does not depend on samples.
            return first, Rows(tuple(counts), MEAN)
    elif layout.dim is not None and not _fits(parts, counts, layout.dim):
        raise SplitError(_no_batch(parts, counts, path, layout.dim))
    return cat(parts, counts, layout)


def is_number(tensor: Tensor) -> bool:
    """Return whether a tensor is a floating-point or complex scalar."""
    return tensor.dim() == 0 and (tensor.is_floating_point() or tensor.is_complex())


def told(column: Sequence[Tensor], counts: Sequence[int], path: str) -> OutputLayout:
    """Find the batch dimension of a tensor from outputs for different numbers of samples.

    Args:
        column: The tensor for each number of samples.
        counts: The numbers, of which at least two differ.
        path: What to call the tensor.

    Raises:
        SplitError: More than one dimension depends on the number, or not in proportion.
    """
    first = column[0]
    if any(tensor.dim() != first.dim() for tensor in column):
        raise SplitError(_no_batch(column, counts, path, 0))
    grown = [d for d in range(first.dim()) if len({t.shape[d] for t in column}) > 1]
    if not grown:
        return OutputLayout(None)
    if len(grown) > 1 or not _fits(column, counts, grown[0]):
        raise SplitError(_no_batch(column, counts, path, grown[0]))
    return OutputLayout(grown[0])


def unjoinable(path: str, tensor: Tensor) -> str:
    """Error message for a tensor that differs though it has no batch dimension."""
    if tensor.dim() == 0:
        return _scalar(path)
    return (
        f"`{path}` of shape {tuple(tensor.shape)} has no dimension for the batch, but differs from"
        " micro-batch to micro-batch, such as `z.T @ z` or `z.sum(0)`. Return what has an entry per"
        " sample, and compute this in the step."
    )


def unordered(path: str, tensor: Tensor, count: int) -> str:
    """Error message for a tensor whose order of samples cannot be told."""
    return (
        f"`{path}` has shape {tuple(tensor.shape)} for {count} samples, and random values, so"
        " the order of the samples in it cannot be determined. Return it with a separate"
        " dimension for the batch (`unflatten`), and flatten it in the step."
    )


def _guess(parts: Sequence[Tensor], counts: Sequence[int], path: str) -> OutputLayout:
    """The first dimension, or else the only one that is as long as each micro-batch."""
    if all(is_number(part) for part in parts):
        return MEAN
    if any(part.dim() == 0 for part in parts):
        raise SplitError(_scalar(path))
    uneven = len(set(counts)) > 1
    if _fits(parts, counts, 0) and (uneven or parts[0].shape[0] == counts[0]):
        return FIRST
    fitting = [d for d in range(1, parts[0].dim()) if _fits(parts, counts, d)]
    fitting = [d for d in fitting if uneven or parts[0].shape[d] == counts[0]]
    if len(fitting) != 1 or _fits(parts, counts, 0):
        raise SplitError(_no_batch(parts, counts, path, 0))
    return OutputLayout(fitting[0])


def _fits(parts: Sequence[Tensor], counts: Sequence[int], dim: int) -> bool:
    """Return whether a dimension grows with the number of samples, and no other does."""
    if len({(part.dim(), *part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
        return False
    if parts[0].dim() == 0:
        return False
    lengths = [part.shape[dim] for part in parts]
    factor, more = divmod(lengths[0], counts[0]) if counts[0] else (1, 0)
    return not more and all(n == factor * k for n, k in zip(lengths, counts, strict=True))


def _no_batch(parts: Sequence[Tensor], counts: Sequence[int], path: str, dim: int) -> str:
    which = "first dimension" if dim == 0 else f"dimension {dim}"
    return (
        f"`{path}`: the module returns a tensor whose {which} is not the batch: from"
        f" micro-batches of {list(counts)} samples it made"
        f" {[tuple(part.shape) for part in parts]}. Return tensors with an entry per sample,"
        " and compute the rest in the step."
    )


def _scalar(path: str) -> str:
    return (
        f"`{path}`: the module returns a tensor without dimensions, computed from one micro-batch."
        " Return what has an entry per sample, and take the mean or the loss in the step."
    )
