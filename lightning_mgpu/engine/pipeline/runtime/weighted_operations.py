"""Operations with a weight, and each of their gradients by itself."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Operation(Protocol):
    """What an operation with a weight computes, forward and backward.

    In all of it `x` is the input, `w` the weight and `g` the gradient of the output. The bias, if
    there is one, is added along the output's dimension of features.
    """

    def multiplications(self, x: Tensor, w: Tensor) -> float:
        """How many it takes, about."""

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

    def multiplications(self, x: Tensor, w: Tensor) -> float:
        return x.shape[:-1].numel() * w.numel()

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


class Convolution(NamedTuple):
    """Convolution or its transpose. `x` has shape (samples, channels, ...).

    Attributes:
        stride: For each dimension that is swept, as all that follows.
        padding: Zeros at both sides.
        dilation: Distance of the weight's entries.
        transposed: Whether it is the transpose.
        output_padding: What the transpose adds at one side.
        groups: Of channels, each of which sees its own input only.
    """

    # In the order in which torch's operations take them.
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def multiplications(self, x: Tensor, w: Tensor) -> float:
        places = x.shape[:1].numel() * x.shape[2:].numel()
        return places * w.numel() / (1 if self.transposed else math.prod(self.stride))

    def output(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        output: Tensor = torch.ops.aten.convolution(x, w, b, *self)
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
        found = torch.ops.aten.convolution_backward(g, x, w, None, *self, wanted)
        gradient: Tensor = found[which]
        return gradient


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
