"""Insert work done elsewhere into the caller's autograd graph as one node."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import backward_keeps_graph

Gradients = Sequence[Tensor | None]
Backward = Callable[[Gradients, bool], Gradients]

# What `graft` adds to the caller's graph. Forward goes from left to right, backward back again:
#
#     inputs,                         token                        outputs, on
#     parameters -----> [ _Work ] -------------> [ _Outputs ] ---> their devices ---> loss
#                           |      (on the CPU)        |
#     its backward          |                          |
#     runs on        the thread that called       a thread of the outputs' device
#     and            takes the gradients from     keeps them in the `_GraftState`,
#                    `_GraftState`, waits for     hands on a token, never waits
#                    the workers, returns one
#                    gradient for each input
#
# With one node instead of two, the waiting would be done by the device's thread, which is the one
# that the workers need for the backward of their own graphs.


def graft(outputs: Sequence[Tensor], inputs: Sequence[Tensor], backward: Backward) -> list[Tensor]:
    """Join `outputs`, computed apart from the caller's graph, to it as a function of `inputs`.

    Whatever the caller's graph may be used for then works: `Tensor.backward`,
    `torch.autograd.grad`, accumulation, hooks on the inputs (which fire once).

    The node itself lies on the CPU. The engine runs a node on the thread of its outputs' device,
    and one that waits there for work on the same device would wait forever; so the outputs are made
    from a CPU token by a second node, which does nothing but hand their gradients on. The first
    node's backward thus runs on the thread that called the engine, where it may wait.

    Args:
        outputs: The values; detached here.
        inputs: What the outputs depend on, parameters among them.
        backward: Given the gradient of each output (`None` where there is none) and whether the
            graph is to be kept for another time, returns the gradient of each input, or `None`.

    Returns:
        The outputs. Those of floating point, or complex, are part of the graph if any input
        requires gradients.

    Raises:
        RuntimeError: In backward, if gradients of gradients are asked for (``create_graph=True``).
    """
    values = [output.detach() for output in outputs]
    floating = [i for i, v in enumerate(values) if v.is_floating_point() or v.is_complex()]
    if not torch.is_grad_enabled() or not floating or not any(x.requires_grad for x in inputs):
        return values
    link = _GraftState(backward, tuple(values[i] for i in floating))
    token = _Work.apply(link, *inputs)  # type: ignore[no-untyped-call]
    joined = _Outputs.apply(link, token)  # type: ignore[no-untyped-call]
    for i, output in zip(floating, joined, strict=True):
        values[i] = output
    return values


class _GraftState:
    """State shared by the two nodes of one graft."""

    def __init__(self, backward: Backward, values: tuple[Tensor, ...]) -> None:
        self.backward = backward
        self.values = values
        self.gradients: Gradients = ()


class _Work(torch.autograd.Function):
    """Node from the inputs to a CPU token; does the work in backward."""

    @staticmethod
    def forward(ctx: Any, link: _GraftState, *inputs: Tensor) -> Tensor:
        ctx.link = link
        return torch.zeros((), device="cpu", dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Gradients of gradients (`create_graph=True`) cannot be computed through work"
                " that was done on several devices. Compute them inside the step with"
                " `strategy='dp'`, where each replica has its own graph."
            )
        gradients, ctx.link.gradients = ctx.link.gradients, ()
        keep = backward_keeps_graph()
        return None, *ctx.link.backward(gradients, keep)


class _Outputs(torch.autograd.Function):
    """Node from the token to the outputs; passes the gradients on in backward."""

    @staticmethod
    def forward(ctx: Any, link: _GraftState, token: Tensor) -> tuple[Tensor, ...]:
        ctx.link = link
        ctx.set_materialize_grads(False)
        # No arguments, whose views as outputs could not be written to in place.
        values, link.values = link.values, ()
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.link.gradients = gradients
        token = torch.zeros((), device="cpu", dtype=torch.float32)
        return None, token
