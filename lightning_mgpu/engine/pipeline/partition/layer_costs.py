"""Measure the time and memory of each layer for one micro-batch."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from lightning_mgpu.engine.pipeline import stage_values
from lightning_mgpu.engine.pipeline.partition.observation import ModuleCall, observe
from lightning_mgpu.engine.pipeline.runtime.split_backward import Multiplications

# The first time is for torch to warm up; of the others, the quickest counts.
_TIMES = 4


@dataclass
class Cost:
    """Time and memory of a layer for one micro-batch.

    Attributes:
        seconds: Of its forward and backward.
        parameters: Bytes of its parameters.
        activations: Bytes that are kept for its backward, parameters apart.
        forward: Of `seconds`, those of its forward.
        weights: Of `seconds`, those for gradients of weights that can come later.
        received: Bytes that it is called with.
        inputs: The same, by the number of the memory, which several layers may be called with.
        returned: Bytes that it returns.
        held: Bytes that gradients of weights need until they are computed later.
    """

    seconds: float = 0.0
    parameters: int = 0
    activations: int = 0
    forward: float = 0.0
    weights: float = 0.0
    received: int = 0
    inputs: Mapping[int, int] = field(default_factory=dict)
    returned: int = 0
    held: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.parameters + other.parameters,
            self.activations + other.activations,
            self.forward + other.forward,
            self.weights + other.weights,
            self.received + other.received,
            {**self.inputs, **other.inputs},
            self.returned + other.returned,
            self.held + other.held,
        )


class Measured(NamedTuple):
    """What was observed, and what each submodule costs for a micro-batch."""

    called: ModuleCall
    costs: dict[str, Cost]


def measured(module: Any, run: Callable[[], Any], least: int | None = None) -> Measured:
    """Watch a module several times.

    Args:
        module: The module.
        run: Calls its `forward` on one micro-batch.
        least: Of how many multiplications gradients of weights come later; `None`: of none.

    Returns:
        The calls, and what each submodule costs in all its calls, by name, with what is computed
        between it and the next; so layers cost together what the module that calls them does. The
        module itself has no name.
        Backward is taken to be shared out like forward, and half of it to be for weights as far as
        products with them are large enough.
    """
    found: list[tuple[ModuleCall, float]] = []
    products = Multiplications(least)
    for time in range(_TIMES):
        with products if time == 0 else nullcontext():
            called, output = observe(module, run, count_kept=True, counter=lambda: products.held)
        whole, _ = observe(module, partial(_backward, module, output))
        found.append((called, whole.seconds))
    costs = _sizes(found[1][0])
    rounds = [_Span(called, called.began, called.began + called.seconds) for called, _ in found[1:]]
    _add_quickest(costs, rounds)
    _share_out(costs, _Span(found[1][0], 0, found[1][0].kept), "activations", "kept_before")
    _share_out(costs, _Span(found[0][0], 0, products.held), "held", "counted_before")
    share = min(back / called.seconds if called.seconds else 0.0 for called, back in found[1:])
    for name, cost in costs.items():
        backward = cost.forward * share
        costs[name] = replace(
            cost,
            seconds=cost.forward + backward,
            weights=backward * products.large_share / 2,
        )
    return Measured(found[0][0], costs)


class _Span(NamedTuple):
    """A call, and from when to when time, or what is kept, counts as its own."""

    call: ModuleCall
    start: float
    end: float

    def inside(self, began: Callable[[ModuleCall], float]) -> list["_Span"]:
        """The calls that it makes, which share it out."""
        calls = self.call.children
        bounds = [self.start, *map(began, calls[1:]), self.end]
        return [_Span(call, *pair) for call, pair in zip(calls, pairwise(bounds), strict=False)]


def _add_quickest(costs: dict[str, Cost], rounds: Sequence[_Span]) -> float:
    """Add the seconds of forward of a call, and of those that it makes, to their costs.

    Args:
        costs: By name.
        rounds: The same call, several times.
    """
    inside = [span.inside(lambda call: call.began) for span in rounds]
    if len({tuple(span.call.name for span in spans) for spans in inside}) > 1:
        inside = inside[:1]  # it does not always make the same ones
    if inside[0]:
        seconds = sum(_add_quickest(costs, spans) for spans in zip(*inside, strict=True))
    else:
        seconds = min(span.end - span.start for span in rounds)
    name = rounds[0].call.name
    costs[name] = replace(costs[name], forward=costs[name].forward + seconds)
    return seconds


def _share_out(costs: dict[str, Cost], span: _Span, what: str, before: str) -> None:
    """Add the bytes of a call, and of those that it makes, to their costs.

    Args:
        costs: By name.
        span: The call.
        what: Which attribute of theirs.
        before: The attribute of calls that says how many bytes there were when they began.
    """
    for inside in span.inside(operator.attrgetter(before)):
        _share_out(costs, inside, what, before)
    known = costs[span.call.name]
    changes: dict[str, Any] = {what: getattr(known, what) + round(span.end - span.start)}
    costs[span.call.name] = replace(known, **changes)


def _sizes(called: ModuleCall) -> dict[str, Cost]:
    totals: dict[str, Cost] = {}
    for call in called.walk():
        known = totals.get(call.name)
        if known is None:
            known = Cost(parameters=sum(p.nbytes for p in call.module.parameters()))
        totals[call.name] = known + Cost(
            received=call.received, inputs=call.inputs, returned=call.returned
        )
    return totals


def _backward(module: Any, output: Any) -> None:
    wanting = [t for t in stage_values.tensors(output) if t.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    if wanting and parameters:
        seeds = [torch.ones_like(tensor) for tensor in wanting]
        torch.autograd.grad(wanting, parameters, seeds, allow_unused=True)
