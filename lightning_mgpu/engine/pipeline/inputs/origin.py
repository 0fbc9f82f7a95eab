"""Find a tensor's origin: the step's batch, the model, or neither."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch import is_functorch_wrapped
from lightning_mgpu.engine.batch import BatchLayout, leaves
from lightning_mgpu.engine.batch.containers import sequences
from lightning_mgpu.engine.batch.graphs import is_graph_batch, tensors_of_graphs
from lightning_mgpu.engine.batch.layout import Kind

_FOREIGN = ("torch.", "lightning.", "numpy.", "builtins")


class StepBatch:
    """The tensors of the step's batch.

    Args:
        batch: The batch, in any structure; `None` if it is not known.
        layout: What is known of batches of this kind; default: nothing.
    """

    def __init__(self, batch: Any = None, layout: BatchLayout | None = None) -> None:
        found = [leaf for _, leaf in leaves(batch)]
        tensors = (leaf for leaf in found if isinstance(leaf, Tensor) and leaf.dim())
        self._tensors = [t for t in tensors if is_wrapped(t) is None]
        self.lengths = {tensor.shape[0] for tensor in self._tensors}
        """The first dimensions."""
        self.size: int | None = None
        """How many samples there are, as far as its tensors agree."""
        self.problem = ""
        """Why that is not known."""
        layout = layout or BatchLayout()
        try:
            self.size = None if batch is None else layout.read(batch)
        except ValueError as error:
            self.problem = str(error).rstrip(".")
        graphs = [leaf for leaf in found if is_graph_batch(leaf)]
        self.of_graphs = storages(t for graph in graphs for t in tensors_of_graphs(graph))
        """The memory of batches of graphs, which have other rows than one for each graph."""
        known = self.size is not None
        self._lists = [
            (value, layout.kind(path) if known else None) for path, value in sequences(batch)
        ]
        self._by_storage: dict[int, list[Tensor]] = {}
        for tensor in self._tensors:
            self._by_storage.setdefault(_storage(tensor), []).append(tensor)

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the batch's, or a view of one."""
        return bool(_storage(tensor)) and _storage(tensor) in self._by_storage

    def kind(self, value: Any) -> Kind | None:
        """Kind of a list in the batch; `None` if it is none of the batch's, or not known."""
        return next((kind for own, kind in self._lists if own is value), None)

    def dimension(self, tensor: Tensor) -> int | None:
        """The dimension of a view that is the first of the batch's tensor.

        Returns:
            `None` if it is no view of the batch, or if strides do not tell.
        """
        if is_wrapped(tensor) is not None or not self.has(tensor):
            return None
        for own in self._by_storage[_storage(tensor)]:
            samples, stride = own.shape[0], own.stride(0)
            if samples < 2 or not stride or (self.size is not None and samples != self.size):
                continue
            fitting = [
                d
                for d in range(tensor.dim())
                if tensor.shape[d] == samples and tensor.stride(d) == stride
            ]
            if len(fitting) == 1:
                return fitting[0]
        return None

    def disagrees(self, tensor: Tensor) -> bool:
        """Return whether a later dimension has the length of another tensor of the batch."""
        return self.has(tensor) and bool(self.lengths & set(tensor.shape[1:]) - {1})


def is_wrapped(tensor: Tensor) -> str | None:
    """Reason why a tensor cannot be sliced: ``"functorch"``, ``"nested"``, or its layout."""
    if is_functorch_wrapped(tensor):
        return "functorch"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def tensors_of(value: Any) -> str:
    """The names of the tensors that an object holds, which is no container; for a message."""
    if isinstance(value, (type, nn.Module)) or not hasattr(value, "__dict__"):
        return ""
    if f"{type(value).__module__}.".startswith(_FOREIGN) and not _is_distribution(value):
        return ""
    found = [name for name, part in vars(value).items() if _holds(part)]
    return ", ".join(f"`{name}`" for name in found[:3])


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """The memory that tensors lie in."""
    return {pointer for tensor in tensors if (pointer := _storage(tensor))}


def _storage(tensor: Tensor) -> int:
    if is_wrapped(tensor) is not None:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _is_distribution(value: Any) -> bool:
    return isinstance(value, torch.distributions.Distribution)


def _holds(value: Any, depth: int = 2) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return any(_holds(part, depth - 1) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds(part, depth - 1) for part in value[:3])
    inner = getattr(value, "__dict__", None)
    if inner and not callable(value) and not isinstance(value, type):
        return any(_holds(part, depth - 1) for part in list(inner.values())[:20])
    return False
