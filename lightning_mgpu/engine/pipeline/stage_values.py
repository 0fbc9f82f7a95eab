"""Values passed from one stage to the next: tensors, or structures of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch import leaves, map_leaves


class _Identity(torch.autograd.Function):
    """Copy of a leaf's value that may be written to in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def enter(leaf: Tensor) -> Tensor:
    return _Identity.apply(leaf) if leaf.requires_grad else leaf  # type: ignore[no-untyped-call]


def copy(leaf: Tensor) -> Tensor:
    """Return a new leaf with the same value."""
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def promise_gradient(tensor: Tensor) -> Tensor:
    """Mark a tensor computed without a graph, so that the next stage returns its gradient."""
    tensor = tensor.detach()
    return tensor.requires_grad_() if may_have_gradient(tensor) else tensor


def may_have_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def take(value: Any) -> list[Tensor | None]:
    """Take and clear the gradients of the leaves in a value."""
    taken: list[Tensor | None] = []
    for tensor in tensors(value):
        taken.append(tensor.grad if tensor.is_leaf else None)
        tensor.grad = None
    return taken


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to the tensors of a value."""
    if isinstance(value, Tensor):
        return function(value)
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)
