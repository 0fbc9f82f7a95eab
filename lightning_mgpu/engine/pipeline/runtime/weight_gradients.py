"""Gradients of weights, apart from those of inputs."""

import operator
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """What an operation with a weight computes, forward and backward.

    In all of it `x` is the input, `w` the weight and `g` the gradient of the output. The bias, if
    there is one, is added along the output's dimension of features.
    """

    def output(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The operation itself."""

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Gradient of `x`."""

    def weight_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Gradient of `w`."""

    def bias_gradient(self, g: Tensor) -> Tensor:
        """Gradient of `b`."""

    def add_weight_gradient(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        """Add the gradient of `w` to a total, in place."""


@dataclass(frozen=True)
class Product:
    """Matrix product with a weight of shape (outputs, inputs), or the other way round.

    `x` has shape (..., inputs) and `g` (..., outputs).
    """

    inputs_first: bool = False

    def output(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, w.t() if self.inputs_first else w, b)

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(g, w.t() if self.inputs_first else w)

    def weight_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.mm(*self._factors(g, x))

    def bias_gradient(self, g: Tensor) -> Tensor:
        return _rows(g).sum(0)

    def add_weight_gradient(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        total.addmm_(*self._factors(g, x))

    def _factors(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        g, x = _rows(g), _rows(x)
        return (x.t(), g) if self.inputs_first else (g.t(), x)


@dataclass(frozen=True)
class Convolution:
    """Convolution or its transpose. `x` has shape (samples, channels, ...).

    Attributes:
        stride: For each dimension that is swept, as all that follows.
        padding: Zeros at both sides.
        dilation: Distance of the weight's entries.
        transposed: Whether it is the transpose.
        output_padding: What the transpose adds at one side.
        groups: Of channels, each of which sees its own input only.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def output(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        output: Tensor = torch.ops.aten.convolution(
            x,
            w,
            b,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return output

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._gradients(g, x, w, 0)

    def weight_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._gradients(g, x, w, 1)

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.sum([0, *range(2, g.dim())])

    def add_weight_gradient(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        total.add_(self.weight_gradient(g, x, w))

    def _gradients(self, g: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        wanted = [index == which for index in range(3)]
        found = torch.ops.aten.convolution_backward(
            g,
            x,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            wanted,
        )
        gradient: Tensor = found[which]
        return gradient


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@dataclass(frozen=True, eq=False)
class WeightGradient:
    """The gradient of a weight, and of a bias, that is still to be computed.

    Attributes:
        operation: Where they were used.
        g: Gradient of its output.
        x: Its input.
        w: The weight, a leaf.
        b: The bias, a leaf with a gradient, if there is one.
    """

    operation: Operation
    g: Tensor
    x: Tensor
    w: Tensor
    b: Tensor | None


class Deferred:
    """Gradients of weights that a backward has left for later.

    Each micro-batch has one for each of its visits to a stage. Only while it is `collecting` does
    backward leave anything to it: what somebody asks for within `forward`, by
    `torch.autograd.grad`, must be there at once.
    """

    def __init__(self) -> None:
        self._found: deque[WeightGradient] = deque()
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
    """Sums of deferred gradients, for the leaves of one device.

    They are kept apart from what autograd accumulates: when a gradient is computed depends on who
    waits for whom, and the order of a sum must not.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def compute(self, gradient: WeightGradient) -> None:
        """Compute a gradient, and add it to its leaf's sum."""
        operation, g, x, w, b = operator.attrgetter("operation", "g", "x", "w", "b")(gradient)
        known = self._sums.get(id(w))
        if known is None:
            self._sums[id(w)] = w, operation.weight_gradient(g, x, w)
        else:
            operation.add_weight_gradient(known[1], g, x, w)
        if b is not None:
            known = self._sums.get(id(b))
            if known is None:
                self._sums[id(b)] = b, operation.bias_gradient(g)
            else:
                known[1].add_(operation.bias_gradient(g))

    def deliver(self) -> None:
        """Add the sums to the gradients of the leaves, and forget them."""
        for leaf, total in self._sums.values():
            leaf.grad = total if leaf.grad is None else leaf.grad + total
        self._sums.clear()
