"""Put together what micro-batches have returned."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.autograd import Gradients
from lightning_mgpu.engine.pipelining import joining
from lightning_mgpu.engine.pipelining.structure import map_leaves

__all__: list[str] = []


class Output:
    """What the micro-batches have returned, put together.

    Args:
        results: Of each micro-batch.
        known: Finds the argument or parameter that a tensor of the first micro-batch stands for,
            which is returned itself.
        counts: Samples in each micro-batch.
        device: Where the output goes.
        layouts: Where the batch lies in its tensors, as far as that has been found out.
        latest: For each micro-batch, finds what has been written to in place of a tensor.
    """

    def __init__(
        self,
        results: Sequence[Any],
        known: Callable[[Tensor], Tensor | None],
        counts: Sequence[int],
        device: torch.device,
        layouts: joining.Layouts | None,
        latest: Sequence[Callable[[Tensor], Tensor]],
    ) -> None:
        self._count = len(results)
        self._found: list[tuple[tuple[Tensor, ...], joining.Rows]] = []
        self._wanting: list[Tensor] = []
        leaves: list[Any] = []
        for place, column in joining.columns(results, counts, "output"):
            if not isinstance(column[0], Tensor):
                leaves.append(joining.same(column, counts, place, proven=bool(layouts)))
                continue
            own = known(column[0])
            if own is not None:
                leaves.append(own)
                continue
            tensors = tuple(find(tensor) for find, tensor in zip(latest, column, strict=True))
            moved = [tensor.detach().to(device) for tensor in tensors]
            with torch.no_grad():
                joined, rows = joining.join(moved, counts, place, layouts)
            joined = joined.detach()
            leaves.append(joined)
            if any(tensor.requires_grad for tensor in tensors):
                self._found.append((tensors, rows))
                self._wanting.append(joined)
        remaining = iter(leaves)
        self._output = map_leaves(lambda _: next(remaining), results[0])

    def wanting(self) -> list[Tensor]:
        """The tensors that are to be part of the caller's graph."""
        return self._wanting

    def replace(self, tensors: Sequence[Tensor]) -> Any:
        """The output with others in their places, of the structure that `forward` returns."""
        new = {id(old): t for old, t in zip(self._wanting, tensors, strict=True)}
        return map_leaves(lambda leaf: new.get(id(leaf), leaf), self._output)

    def forget(self) -> None:
        """Have no gradients to be split any more."""
        self._found = []

    def split(self, gradients: Gradients) -> list[list[tuple[Tensor, Tensor]]]:
        """For each micro-batch, the tensors that it has returned, with their gradients."""
        split: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self._count)]
        for (tensors, rows), gradient in zip(self._found, gradients, strict=True):
            parts = rows.split(gradient, self._count)
            for chunk, tensor, part in zip(split, tensors, parts, strict=True):
                if part is not None and tensor.requires_grad:
                    chunk.append((tensor, part))
        return split
