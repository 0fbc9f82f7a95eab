"""Cut tensors into micro-batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import version_kept, version_of


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
    tensors: Mapping[str, Tensor], dims: Mapping[str, int], parts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Views of each micro-batch's tensors.

    Args:
        tensors: By name.
        dims: The batch dimension of those to be split; the others go to every micro-batch.
        parts: Samples in each micro-batch.
    """
    pieces = {name: torch.split(tensors[name], list(parts), dim) for name, dim in dims.items()}
    return [
        {name: _apart(pieces[name][index]) if name in dims else t for name, t in tensors.items()}
        for index in range(len(parts))
    ]


def count_writing(
    tensors: Mapping[str, Tensor], dims: Mapping[str, int], chunks: Sequence[Mapping[str, Tensor]]
) -> None:
    """Tell autograd about in-place writes to parts of tensors.

    Args:
        tensors: By name.
        dims: The batch dimension of those that were split.
        chunks: What `cut` has made of them.
    """
    if not torch.is_grad_enabled():
        return
    for name in dims:
        parts = [chunk[name] for chunk in chunks]
        if any(version_of(part) > 0 for part in parts if _can_be_apart(part)):
            torch.autograd.graph.increment_version(tensors[name])


def _apart(view: Tensor) -> Tensor:
    """Tensor over the same memory with a version counter of its own.

    Views of one tensor share its counter. If a stage writes to its micro-batch, as a first layer
    in place does, autograd would take the memory of all others for overwritten, too.
    """
    if not torch.is_grad_enabled() or not _can_be_apart(view):
        return view
    storage, offset = view.untyped_storage(), view.storage_offset()
    own = torch.empty(0, dtype=view.dtype, device=view.device)
    with version_kept(own), torch.no_grad():  # (`set_` counts as writing)
        own.set_(storage, offset, view.shape, view.stride())
    return own.requires_grad_(view.requires_grad)


def _can_be_apart(view: Tensor) -> bool:
    if type(view) is not Tensor or view.layout is not torch.strided:
        return False
    return not (view.is_inference() or view.is_conj() or view.is_neg())
