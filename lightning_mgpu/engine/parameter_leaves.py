"""Leaves of one slot's graph: aliases or copies of the master's parameters."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch import add_to_each, version_of
from lightning_mgpu.engine.device import copy_into


class Leaf(nn.Parameter):
    """A parameter whose `data` shows when it is written to.

    That of an ordinary one has a version counter of its own, and replacing it leaves no trace.
    """

    @property
    def data(self) -> Tensor:
        """The values, without a graph; in-place writes move the leaf's version counter."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        marks, index = vars(self).get(_MARKS, (set(), 0))
        marks.add(index)
        set_data(self, value)


def set_data(leaf: Tensor, value: Tensor) -> None:
    """Replace a leaf's values and memory, as we do ourselves."""
    Tensor.data.__set__(leaf, value)  # type: ignore[attr-defined]


_MARKS = "_mgpu_marks"


class Leaves:
    """A leaf for each parameter, with which one slot computes.

    On the parameters' own device leaves are aliases and cost nothing; changes in place are seen at
    once. On another they are views of one flat buffer for each dtype, refreshed by one transfer.

    Args:
        parameters: The master's.
        device: Where the slot computes.
        own_memory: Whether the leaves have memory of their own; default: if they are elsewhere.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        own_memory: bool | None = None,
    ) -> None:
        self._parameters = list(parameters)
        elsewhere = any(parameter.device != device for parameter in parameters)
        self._buckets: list[_Bucket] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self.leaves: list[nn.Parameter] = [_alias(p, p.detach()) for p in parameters]
        self._shown: list[Tensor | None] = [None] * len(self.leaves)
        if elsewhere if own_memory is None else own_memory:
            self._own(device)
        self._marks: set[int] = set()
        for index, leaf in enumerate(self.leaves):
            vars(leaf)[_MARKS] = self._marks, index

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over values, frozen or not, and storages from the master's parameters."""
        for parameter, leaf in zip(self._parameters, self.leaves, strict=True):
            if leaf.requires_grad != parameter.requires_grad:
                leaf.requires_grad_(parameter.requires_grad)
            if not self._buckets and leaf.data_ptr() != parameter.data_ptr():
                set_data(leaf, parameter.data)  # somebody has swapped the storage
        for bucket in self._buckets:
            bucket.refresh()
        for own, view in self._views:
            if own.data_ptr() != view.data_ptr():
                set_data(own, view)

    def is_alias(self) -> bool:
        """Return whether the leaves alias the parameters and share their version counters."""
        return not self._buckets

    def versions(self) -> list[int]:
        """Version counter (number of in-place writes) of each leaf."""
        return [version_of(leaf) for leaf in self.leaves]

    def assigned(self) -> set[int]:
        """The indices of the leaves whose `data` somebody has replaced; may be emptied."""
        return self._marks

    def keep_freezing(self) -> None:
        """Copy the step's changes of `requires_grad` from leaves to parameters."""
        for parameter, leaf in zip(self._parameters, self.leaves, strict=True):
            if parameter.requires_grad != leaf.requires_grad:
                parameter.requires_grad_(leaf.requires_grad)

    @torch.no_grad()
    def show_gradients(self, copy: bool) -> None:
        """Let the leaves have the gradients of their parameters, or copies of them."""
        for parameter, leaf in zip(self._parameters, self.leaves, strict=True):
            gradient = parameter.grad
            if gradient is not None and copy:
                gradient = gradient.to(leaf.device, copy=True)
            leaf.grad = gradient
        self._shown = [leaf.grad for leaf in self.leaves]

    def check_gradients(self) -> None:
        """Refuse gradients that the step has set itself.

        Raises:
            RuntimeError: A leaf has a gradient other than the one it was shown with.
        """
        for leaf, shown in zip(self.leaves, self._shown, strict=True):
            if leaf.grad is not shown:
                raise RuntimeError(
                    "`training_step` assigned `parameter.grad`; other replicas do not see it."
                    " Use `self.manual_backward(loss)` rather than `loss.backward()`, and"
                    " change gradients in place (`p.grad.mul_(0.5)`)."
                )

    def take_gradients(self) -> list[Tensor | None]:
        """The gradients accumulated in the leaves, which forget them."""
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        self._shown = [None] * len(self.leaves)
        return gradients

    def _own(self, device: torch.device) -> None:
        by_dtype = defaultdict(list)
        for index, parameter in enumerate(self._parameters):
            by_dtype[parameter.dtype].append(index)
        for indices in by_dtype.values():
            bucket = _Bucket([self._parameters[i] for i in indices], device)
            self._buckets.append(bucket)
            for i, view in zip(indices, bucket.views, strict=True):
                self.leaves[i] = _alias(self._parameters[i], view)
                self._views.append((self.leaves[i], view))


class _Bucket:
    """Parameters of one dtype, copied to another device in one piece."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        size = sum(parameter.numel() for parameter in parameters)
        self._flat = torch.empty(size, dtype=parameters[0].dtype, device=device)
        pieces = torch.split(self._flat, [parameter.numel() for parameter in parameters])
        self.views = [
            piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)
        ]

    def refresh(self) -> None:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])
        copy_into(self._flat, flat)


@torch.no_grad()
def add_gradients(
    gradients: Sequence[Sequence[Tensor | None]], root: torch.device, indices: Sequence[int]
) -> list[Tensor | None]:
    """Sum each parameter's gradients over the slots, in the order of the slots.

    Args:
        gradients: Slots x parameters. Those on `root` may be written to.
        root: Where the sums lie.
        indices: Which parameters; the work can be shared out by them.

    Returns:
        The sums, for `indices`; `None` where no slot has a gradient.
    """
    totals = [gradients[0][i] for i in indices]
    for others in gradients[1:]:
        arrived = _to_device([others[i] for i in indices], root)
        into: list[Tensor] = []
        dense: list[Tensor] = []
        for j, (total, other) in enumerate(zip(totals, arrived, strict=True)):
            if total is None or other is None:
                totals[j] = other if total is None else total
            elif total.is_sparse or other.is_sparse:
                totals[j] = total + other
            else:
                into.append(total)
                dense.append(other)
        if into:
            add_to_each(into, dense)
    return totals


def _to_device(gradients: Sequence[Tensor | None], root: torch.device) -> list[Tensor | None]:
    """The gradients on `root`; dense ones of one dtype travel in one piece."""
    moved = list(gradients)
    by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        if gradient is not None and gradient.device != root:
            if gradient.is_sparse:
                moved[index] = gradient.to(root)
            else:
                by_dtype[gradient.dtype].append((index, gradient))
    for elsewhere in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for _, gradient in elsewhere]).to(root)
        pieces = torch.split(flat, [gradient.numel() for _, gradient in elsewhere])
        for (index, gradient), piece in zip(elsewhere, pieces, strict=True):
            moved[index] = piece.view(gradient.shape)
    return moved


def _alias(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    leaf: nn.Parameter = Leaf(data, requires_grad=parameter.requires_grad)
    if vars(parameter):
        vars(leaf).update(vars(parameter))  # what optimizers and samplers mark parameters with
    return leaf
