"""Gradients of weights that come later than those of inputs."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mgpu.engine.device import autocast_dtype
from lightning_mgpu.engine.pipeline.runtime.weighted_operations import Operation


class WeightGradient(NamedTuple):
    """The gradient of a weight, and of a bias, that is still to be computed.

    Attributes:
        operation: Where they were used.
        g: Gradient of its output.
        x: Its input.
        w: The weight it was computed with.
        weight: The leaf that has the gradient; under autocast of another dtype than `w`.
        bias: The bias, a leaf, if it has a gradient.
    """

    operation: Operation
    g: Tensor
    x: Tensor
    w: Tensor
    weight: Tensor
    bias: Tensor | None


class Deferred:
    """Gradients of weights that a backward has left for later.

    Each micro-batch has one for each of its visits to a stage. Only while it is `collecting` does
    backward leave anything to it: what somebody asks for within `forward`, by
    `torch.autograd.grad`, must be there at once.
    """

    def __init__(self) -> None:
        self._found: deque[WeightGradient] = deque()
        self.is_used = False
        """Whether there is anything that leaves gradients here."""
        self.is_open = False
        """Whether gradients are to be left."""

    def add(self, gradient: WeightGradient) -> None:
        """Leave a gradient for later."""
        self._found.append(gradient)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Context in which gradients are left."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def take(self) -> deque[WeightGradient]:
        """Take what has been left."""
        found, self._found = self._found, deque()
        return found


class WeightGradients:
    """Deferred gradients of one device, and the sums of those that have been computed.

    The sums are kept apart from what autograd accumulates: when a gradient is computed depends on
    who waits for whom, and the order of a sum must not.

    Args:
        at: A context for work that a stage has left of a micro-batch.
    """

    def __init__(self, at: Callable[[int, int], AbstractContextManager[None]]) -> None:
        self._at = at
        self._left: deque[tuple[int, int, deque[WeightGradient]]] = deque()
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def leave(self, stage: int, chunk: int, gradients: deque[WeightGradient]) -> None:
        """Leave gradients of a visit for later."""
        if gradients:
            self._left.append((stage, chunk, gradients))

    def work(self) -> bool:
        """Compute the oldest gradient, if there is one; return whether there are more."""
        if self._left:
            self._of_oldest(1)
        return bool(self._left)

    def work_off(self, visits: int) -> None:
        """Compute gradients, the oldest first, until there are at most so many visits left."""
        while len(self._left) > visits:
            self._of_oldest(len(self._left[0][2]))

    def deliver(self) -> None:
        """Add the sums to the gradients of the leaves, and forget them."""
        for leaf, total in self._sums.values():
            leaf.grad = total if leaf.grad is None else leaf.grad + total
        self._sums.clear()

    def _of_oldest(self, count: int) -> None:
        stage, chunk, gradients = self._left[0]
        with torch.no_grad(), self._at(stage, chunk):
            for _ in range(count):
                self._compute(gradients.popleft())
        if not gradients:
            self._left.popleft()

    def _compute(self, gradient: WeightGradient) -> None:
        operation, g, x, w = gradient.operation, gradient.g, gradient.x, gradient.w
        known = self._sums.get(id(gradient.weight))
        # Within autocast, as backward should not be, products have another dtype.
        is_same = gradient.weight.dtype == g.dtype and autocast_dtype(g.device) is None
        if known is not None and is_same:
            operation.add_weight_gradient(known[1], g, x, w)
        else:
            self._add(gradient.weight, operation.weight_gradient(g, x, w))
        if gradient.bias is not None:
            self._add(gradient.bias, operation.bias_gradient(g))

    def _add(self, leaf: Tensor, gradient: Tensor) -> None:
        if id(leaf) in self._sums:
            self._sums[id(leaf)][1].add_(gradient)
        else:
            self._sums[id(leaf)] = leaf, gradient.to(leaf.dtype)
