"""Measure the time and memory of each layer for one micro-batch."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
    """

    seconds: float = 0.0
    parameters: int = 0
    activations: int = 0
    forward: float = 0.0
    weights: float = 0.0
    received: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.parameters + other.parameters,
            self.activations + other.activations,
            self.forward + other.forward,
            self.weights + other.weights,
            self.received + other.received,
        )


def measured(
    module: Any, run: Callable[[], Any], least: int | None = None
) -> tuple[ModuleCall, dict[str, Cost]]:
    """Watch a module several times.

    Args:
        module: The module.
        run: Calls its `forward` on one micro-batch.
        least: Of how many multiplications gradients of weights come later; `None`: of none.

    Returns:
        The calls, and what each submodule costs in all its calls, by name. Backward is taken to be
        shared out like forward, and half of it to be for weights as far as products with them are
        large enough.
    """
    found: list[tuple[ModuleCall, float]] = []
    products = Multiplications(least)
    for time in range(_TIMES):
        with products if time == 0 else nullcontext():
            called, output = observe(module, run, count_kept=True)
        whole, _ = observe(module, partial(_backward, module, output))
        found.append((called, whole.seconds))
    costs: dict[str, Cost] = {}
    rounds = [_totals(called) for called, _ in found[1:]]
    for name, first in rounds[0].items():
        forward = min(totals.get(name, first).seconds for totals in rounds)
        share = min(back / called.seconds if called.seconds else 0.0 for called, back in found[1:])
        costs[name] = replace(
            first,
            seconds=forward * (1 + share),
            forward=forward,
            weights=forward * share * products.large_share / 2,
        )
    return found[0][0], costs


def _totals(called: ModuleCall) -> Mapping[str, Cost]:
    totals: dict[str, Cost] = {}
    for call in called.walk():
        known = totals.get(call.name)
        if known is None:
            known = Cost(parameters=sum(p.nbytes for p in call.module.parameters()))
        totals[call.name] = known + Cost(call.seconds, 0, call.kept, received=call.received)
    return totals


def _backward(module: Any, output: Any) -> None:
    wanting = [t for t in stage_values.tensors(output) if t.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    if wanting and parameters:
        seeds = [torch.ones_like(tensor) for tensor in wanting]
        torch.autograd.grad(wanting, parameters, seeds, allow_unused=True)
