"""The output of a module in stages, and where its gradients go."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.autograd import Gradients
from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipelining import joining
from lightning_mgpu.engine.pipelining.partition import Name, Partition, fill
from lightning_mgpu.engine.pipelining.trace import Result

__all__: list[str] = []


class _Parts:
    """Where the tensors of the output that want gradients come from."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: list[tuple[Name, int, int, joining.Rows]] = []

    def add(self, name: Name, index: int, of: int, rows: joining.Rows) -> None:
        """One more: tensor `index` of `of` in the result of that name."""
        self._found.append((name, index, of, rows))

    def split(self, gradients: Gradients) -> list[dict[Name, list[Tensor | None]]]:
        """For each micro-batch, the gradients of the tensors in each result."""
        split: list[dict[Name, list[Tensor | None]]] = [{} for _ in range(self._count)]
        for (name, index, of, rows), gradient in zip(self._found, gradients, strict=True):
            for chunk, part in zip(split, rows.split(gradient, self._count), strict=True):
                chunk.setdefault(name, [None] * of)[index] = part
        return split


class Output:
    """What the micro-batches have returned, put together.

    Args:
        partition: The stages.
        results: Of each micro-batch, by name; emptied.
        arguments: The tensors that the module was called with, by name. If it returns one, that is
            the very same object, as from the module itself.
        split: The arguments that were split.
        counts: Samples in each micro-batch.
        device: Where the output goes.
        layouts: Where the batch lies in its tensors, as far as that has been found out.
    """

    def __init__(
        self,
        partition: Partition,
        results: Sequence[dict[Name, Any]],
        arguments: Mapping[Name, Tensor],
        split: frozenset[Name],
        counts: Sequence[int],
        device: torch.device,
        layouts: joining.Layouts | None = None,
    ) -> None:
        self._template = partition.template
        self._values: dict[Name, Any] = {}
        self._wanting: list[Tensor] = []
        self.parts = _Parts(len(results))
        for name, path in paths(partition).items():
            if name in arguments:
                self._values[name] = arguments[name]
                continue
            values = [chunk.pop(name) for chunk in results]
            with torch.no_grad():
                whole = not partition.origins[name] & split
                joined, rows = joining.join(values, counts, whole, path, layouts)
            wants = _wanting(values)
            self._values[name] = map_leaves(lambda x: _to(x, device), joined)
            tensors = [leaf for _, leaf in leaves(self._values[name]) if isinstance(leaf, Tensor)]
            for index, (tensor, how) in enumerate(zip(tensors, rows, strict=True)):
                if wants[index]:
                    self._wanting.append(tensor)
                    self.parts.add(name, index, len(tensors), how)

    def wanting(self) -> list[Tensor]:
        """The tensors that are to be part of the caller's graph."""
        return self._wanting

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Put others in their places."""
        new = {id(old): t for old, t in zip(self._wanting, tensors, strict=True)}
        for name, value in self._values.items():
            self._values[name] = map_leaves(lambda leaf: new.get(id(leaf), leaf), value)

    def filled(self) -> Any:
        """The output, of the structure that `forward` returns."""
        return fill(self._template, self._values)


def paths(partition: Partition) -> dict[Name, str]:
    """Where in the output each result lies, first."""
    found = {
        leaf.name: path
        for path, leaf in reversed([*leaves(partition.template, "output")])
        if isinstance(leaf, Result)
    }
    return {name: found.get(name, "output") for name in dict.fromkeys(partition.results)}


def _wanting(values: Sequence[Any]) -> list[bool]:
    """For each tensor in a result, whether it wants a gradient in any micro-batch."""
    columns = zip(
        *([leaf for _, leaf in leaves(v) if isinstance(leaf, Tensor)] for v in values), strict=True
    )
    return [any(tensor.requires_grad for tensor in column) for column in columns]


def _to(leaf: Any, device: torch.device) -> Any:
    return leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf
