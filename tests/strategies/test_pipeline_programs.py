"""Random programs between layers: a pipeline gives what one device gives, or refuses."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipelines import data
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mgpu.engine.pipeline.check.parity import Parity
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks

# What is done with two values of the pool and a number, and whether the result joins the pool.
Operation = Callable[["Program", Tensor, Tensor, int], Tensor | None]


def _add_in_place(net: "Program", a: Tensor, b: Tensor, k: int) -> None:
    a += b.clone()


def _scale_in_place(net: "Program", a: Tensor, b: Tensor, k: int) -> None:
    a.mul_(0.5)


def _write_slice(net: "Program", a: Tensor, b: Tensor, k: int) -> None:
    a[:, :4] = b[:, 4:].clone()


def _write_through_a_view(net: "Program", a: Tensor, b: Tensor, k: int) -> None:
    a[:, 2:5].mul_(2)


def _function_in_place(net: "Program", a: Tensor, b: Tensor, k: int) -> None:
    F.relu_(a)


def _without_gradient(net: "Program", a: Tensor, b: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        return net.units[k](a)


def _halves_swapped(net: "Program", a: Tensor, b: Tensor, k: int) -> Tensor:
    left, right = a.chunk(2, 1)
    return torch.cat([right, left], 1)


def _layer(net: "Program", a: Tensor, b: Tensor, k: int) -> Tensor:
    return net.units[k](a)


OPERATIONS: list[Operation] = [
    *(_layer, _layer, _layer, _without_gradient, _halves_swapped),
    *(_add_in_place, _scale_in_place, _write_slice, _write_through_a_view, _function_in_place),
    lambda net, a, b, k: a + b,
    lambda net, a, b, k: a * b,
    lambda net, a, b, k: a.view(-1, 8),
    lambda net, a, b, k: a.detach(),
    lambda net, a, b, k: a.clone(),
    lambda net, a, b, k: net.relu(a),
    lambda net, a, b, k: a * net.weight,
]


class Program(nn.Module):
    """Operations on a pool of values, which grows."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))
        self.embed, self.relu = nn.Linear(6, 8), nn.ReLU(inplace=True)
        self.weight = nn.Parameter(torch.rand(8))
        self.steps = [
            (draw.choice(OPERATIONS), draw.randrange(20), draw.randrange(20), draw.randrange(5))
            for _ in range(draw.randrange(4, 12))
        ]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        pool = [self.embed(x)]
        for operation, i, j, k in self.steps:
            made = operation(self, pool[i % len(pool)], pool[j % len(pool)], k)
            if made is not None:
                pool.append(made)
        return pool[-1] + pool[-2 if len(pool) > 1 else -1] + pool[0]


def _results(net: Program, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output, and the gradient of each parameter; zeros where there is none."""
    output = call(data(8, 6))
    weights = torch.linspace(0, 1, output.numel(), dtype=torch.float64).view(output.shape)
    parameters = list(net.parameters())
    loss = (output.abs() * weights).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [output.detach(), *gradients]


@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_programs_give_what_one_device_gives_or_are_refused(
    seed: int, stages: int, checkpoint: Any
) -> None:
    draw = random.Random(f"{seed} {stages} {checkpoint}")
    devices = [torch.device("cpu")] * stages
    same = 0
    for _ in range(30):
        net = Program(draw)
        try:
            expected = _results(net, net.forward)
        except RuntimeError:
            continue  # no program that torch can differentiate
        run = Pipeline(
            *(Cutter(net, net.forward, stages), Splitter(), devices),
            chunks=Chunks(stages, 2),
            checkpoint=checkpoint,
            parity=Parity("error", "Program", devices),
        )
        try:
            found = _results(net, run)
        except (PartitionError, RuntimeError):
            continue
        finally:
            run.close()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        same += 1
    assert same > 3
