"""Operations whose backward leaves the gradient of the weight for later.

Backward of a layer computes two gradients that do not need each other: that of its input, which
the stage before waits for, and that of its weight, which nobody waits for (Qi et al., 2023,
arXiv 2401.10241). Whatever runs within a pipeline is watched for products and convolutions with a
parameter; those are computed by a node of our own. Everything else keeps its whole backward.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_mgpu._compat.torch import (
    attention_with_modes,
    is_functorch_wrapped,
    saves_are_hooked,
)
from lightning_mgpu.engine.device import autocast_dtype
from lightning_mgpu.engine.parameter_leaves import Leaf
from lightning_mgpu.engine.pipeline.runtime.weight_gradients import Deferred, WeightGradient
from lightning_mgpu.engine.pipeline.runtime.weighted_operations import (
    Convolution,
    Operation,
    Product,
)

_Found = tuple[Operation, Tensor, Tensor, Tensor | None]


class SplitBackward(TorchFunctionMode):
    """Mode in which products with weights leave the weights' gradients for later.

    Args:
        least: How many multiplications are worth it.
        into: Where gradients are left; `None` to leave none.
    """

    def __init__(self, least: int, into: Deferred | None = None) -> None:
        super().__init__()
        self.least, self.into = least, into

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parse = _PARSERS.get(func)
        if parse is None or self.into is None or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if parse is _attention:
            with self:  # which is off in here
                return attention_with_modes(*args, **(kwargs or {}))
        found = self._split(parse, self.into, args, kwargs or {})
        return func(*args, **(kwargs or {})) if found is None else found

    def _split(
        self,
        parse: Callable[..., _Found | None],
        into: Deferred,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        try:
            found = parse(*args, **kwargs)
        except (TypeError, AttributeError):  # arguments that the function itself refuses
            return None
        if found is None:
            return None
        operation, x, w, b = found
        if type(w) is not Leaf or not w.requires_grad or not (b is None or type(b) is Leaf):
            return None
        if type(x) is not Tensor or operation.multiplications(x, w) < self.least:
            return None
        dtype = autocast_dtype(x.device)
        if dtype is not None and torch.float64 in (x.dtype, w.dtype):
            return None  # which autocast leaves alone
        if not _is_plain(x):
            return None
        into.is_used = True
        return _apply(x, w, b, operation, dtype, into)


class Multiplications(TorchFunctionMode):
    """Mode that counts the multiplications of products with parameters.

    Args:
        least: How many make a product a large one; `None`: none is.
    """

    def __init__(self, least: int | None) -> None:
        super().__init__()
        self._least, self._all, self._large = least, 0.0, 0.0
        self.held = 0
        """Bytes that gradients of the weights of large ones need: of inputs, and of outputs."""

    @property
    def large_share(self) -> float:
        """Share of the multiplications that are in large products."""
        return self._large / self._all if self._all else 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        parse, kwargs = _PARSERS.get(func), kwargs or {}
        if parse is _attention and not torch.compiler.is_compiling():
            with self:  # which is off in here
                return attention_with_modes(*args, **kwargs)
        output = func(*args, **kwargs)
        if parse is not None and not torch.compiler.is_compiling():
            with suppress(TypeError, AttributeError):  # other arguments than those of products
                self._count(parse(*args, **kwargs), output)
        return output

    def _count(self, found: _Found | None, output: Tensor) -> None:
        if found is not None and isinstance(found[2], nn.Parameter):
            count = found[0].multiplications(found[1], found[2])
            self._all += count
            if self._least is not None and count >= self._least:
                self._large += count
                self.held += found[1].nbytes + output.nbytes


class _SplitNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        operation: Operation,
        dtype: torch.dtype | None,
        into: Deferred,
    ) -> Tensor:
        ctx.leaves, ctx.dtype_of_x = (w, b), x.dtype
        if dtype is not None:
            # As autocast does, but for its cache, which is for tensors with a graph.
            x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
        ctx.save_for_backward(x, w)
        ctx.operation, ctx.into = operation, into
        return operation.output(x, w, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        x, w = ctx.saved_tensors
        operation: Operation = ctx.operation
        wants_x, wants_w, wants_b, *_ = ctx.needs_input_grad
        of_x = operation.input_gradient(g, x, w).to(ctx.dtype_of_x) if wants_x else None
        if ctx.into.is_open:
            weight, bias = ctx.leaves
            left = WeightGradient(operation, g, x, w, weight, bias if wants_b else None)
            ctx.into.add(left)
            return of_x, None, None, None, None, None
        of_w = operation.weight_gradient(g, x, w) if wants_w else None
        of_b = operation.bias_gradient(g) if wants_b else None
        return of_x, of_w, of_b, None, None, None


_apply: Callable[..., Tensor] = _SplitNode.apply


def _is_plain(x: Tensor) -> bool:
    """Return whether an operation on an input computes what it says, and autograd saves it."""
    return (
        torch.is_grad_enabled()
        and x.layout is torch.strided
        and x.is_floating_point()
        and not is_functorch_wrapped(x)
        and not saves_are_hooked()
    )


def _attention(*args: Any, **kwargs: Any) -> None:
    """What `SplitBackward` looks into."""


# The arguments have the names of those of the functions.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Found | None:
    is_usual = (
        input.dim() > 0 and weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    )
    return (Product(), input, weight, bias) if is_usual else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> _Found | None:
    is_bias = input.shape == mat2.shape[1:]
    return (Product(inputs_first=True), mat1, mat2, input) if is_bias else None


def _matmul(input: Tensor, other: Tensor) -> _Found | None:
    is_product = input.dim() >= 2 and other.dim() == 2
    return (Product(inputs_first=True), input, other, None) if is_product else None


def _mm(input: Tensor, mat2: Tensor) -> _Found | None:
    return _matmul(input, mat2)


def _convolution(dimensions: int) -> Callable[..., _Found | None]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> _Found | None:
        sizes = stride, padding, dilation
        return _convolved(dimensions, input, weight, bias, sizes, groups)

    return parse


def _transposed(dimensions: int) -> Callable[..., _Found | None]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> _Found | None:
        sizes = stride, padding, dilation
        return _convolved(dimensions, input, weight, bias, sizes, groups, output_padding)

    return parse


def _convolved(
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[Any, Any, Any],
    groups: int,
    output_padding: Any = None,
) -> _Found | None:
    """A convolution with a stride, padding and dilation, or its transpose if `output_padding`."""
    if input.dim() != dimensions + 2 or isinstance(sizes[1], str):
        return None
    stride, padding, dilation, more = (
        _each(size, dimensions) for size in (*sizes, output_padding or 0)
    )
    transposed = output_padding is not None
    return Convolution(stride, padding, dilation, transposed, more, groups), input, weight, bias


def _each(size: Any, dimensions: int) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


_PARSERS: dict[Any, Callable[..., _Found | None]] = {
    functional.multi_head_attention_forward: _attention,
    functional.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
}
