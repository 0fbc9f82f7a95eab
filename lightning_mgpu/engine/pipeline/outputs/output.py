"""Join what the micro-batches return into one output."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.autograd import Gradients
from lightning_mgpu.engine.pipeline.outputs import joining
from lightning_mgpu.engine.pipeline.outputs.columns import Column, columns_of, merged, same
from lightning_mgpu.engine.pipeline.outputs.object_structure import leaves, map_leaves


class Output:
    """Joined outputs of the micro-batches.

    Args:
        results: Of each micro-batch.
        known: Finds the argument or parameter that a tensor of the first micro-batch stands for,
            which is returned itself.
        counts: Samples in each micro-batch.
        device: Where the output goes.
        layouts: Where the batch lies in its tensors, as far as that has been found out.
        latest: For each micro-batch, finds what has been written to in place of a tensor.
        guess: As `joining.join` has it.

    Raises:
        SplitError: It cannot be put together.
        Undecided: As `joining.join`.
    """

    def __init__(
        self,
        results: Sequence[Any],
        known: Callable[[Tensor], Tensor | None],
        counts: Sequence[int],
        device: torch.device,
        layouts: joining.Layouts | None,
        latest: Sequence[Callable[[Tensor], Tensor]],
        guess: bool,
    ) -> None:
        self._counts, self._device, self._layouts = counts, device, layouts
        self._guess = guess
        self._found: list[tuple[dict[int, Tensor], joining.Rows]] = []
        self._wanting: list[Tensor] = []
        columns = columns_of(results, counts, "output", layouts)
        joined: list[Any] = []
        for column in columns:
            if column.entries:
                joined += self._entries(column, latest)
            else:
                joined.append(self._leaf(column, known, latest))
        remaining = iter(joined)
        together = merged(results, columns, "output")
        self._output = map_leaves(lambda _: next(remaining), together)

    # (`known` and `latest` lead to activations, which go with the micro-batches.)

    def _leaf(
        self,
        column: Column,
        known: Callable[[Tensor], Tensor | None],
        latest: Sequence[Callable[[Tensor], Tensor]],
    ) -> Any:
        first = column.values[0]
        if not isinstance(first, Tensor):
            proven = bool(self._layouts)
            return same(column.values, self._counts, column.place, proven=proven)
        own = known(first)
        if own is not None:
            return own
        pairs = zip(latest, column.values, strict=True)
        tensors = tuple(find(tensor) for find, tensor in pairs)
        moved = [tensor.detach().to(self._device) for tensor in tensors]
        with torch.no_grad():
            joined, rows = joining.join(
                moved, self._counts, column.place, self._layouts, self._guess
            )
        return self._noted(dict(enumerate(tensors)), joined.detach(), rows)

    def _entries(
        self, column: Column, latest: Sequence[Callable[[Tensor], Tensor]]
    ) -> Iterator[Any]:
        """The leaves of all entries, each of which is one micro-batch's."""
        for chunk, value in enumerate(column.values):
            for _, leaf in leaves(value, column.place):
                if not isinstance(leaf, Tensor):
                    yield leaf
                    continue
                tensor = latest[chunk](leaf)
                rows = joining.Rows(None, owner=chunk)
                yield self._noted({chunk: tensor}, tensor.detach().to(self._device), rows)

    def _noted(self, tensors: dict[int, Tensor], joined: Tensor, rows: joining.Rows) -> Tensor:
        """Return a joined tensor; record it if it is part of a graph."""
        if any(tensor.requires_grad for tensor in tensors.values()):
            self._found.append((tensors, rows))
            self._wanting.append(joined)
        return joined

    def wanting(self) -> list[Tensor]:
        """Tensors that become part of the caller's graph."""
        return self._wanting

    def replace(self, tensors: Sequence[Tensor]) -> Any:
        """Output with other tensors in their places, in the structure that `forward` returns."""
        new = {id(old): t for old, t in zip(self._wanting, tensors, strict=True)}
        return map_leaves(lambda leaf: new.get(id(leaf), leaf), self._output)

    def forget(self) -> None:
        """Discard the record needed to split gradients."""
        self._found = []

    def split(self, gradients: Gradients) -> list[list[tuple[Tensor, Tensor]]]:
        """Each micro-batch's output tensors with their gradients."""
        split: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._counts]
        for (tensors, rows), gradient in zip(self._found, gradients, strict=True):
            parts = rows.split(gradient, len(self._counts))
            for chunk, tensor in tensors.items():
                part = parts[chunk]
                if part is not None and tensor.requires_grad:
                    split[chunk].append((tensor, part))
        return split
