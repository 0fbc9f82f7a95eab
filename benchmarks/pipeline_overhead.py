"""Microseconds that a pipeline adds to its layers, forward and backward, on CPU devices.

Of a call of the module, of each hand-over to another stage, and of each unit (a layer that belongs
to a stage as a whole), by layers that multiply one number: what they take without a pipeline is
subtracted. Beside it, what many small layers make of that: a step of 24 encoder layers of width 128
on two devices, against one thread's time for the same micro-batches, halved.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rounds import spread
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.hand_over import hand_over_seconds
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks

_FEW, _MANY = 8, 72
_CPU = torch.device("cpu")


class _Scaled(nn.Module):
    """As little as a layer with a parameter can do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=40, help="measured steps a round (default 40)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, value in {**_overheads(arguments.steps), **_small_layers(10)}.items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        print(f"{name:44}{spread(values)}")


def _overheads(steps: int) -> dict[str, float]:
    """Microseconds of each thing."""

    def through(stages: int, layers: int) -> float:
        return 1e6 * _added([_Scaled() for _ in range(layers)], stages, steps)

    call, two, many = through(1, _FEW), through(2, _FEW), through(2, _MANY)
    unit = (many - two) / (_MANY - _FEW)
    return {
        "call of the module, us": call - _FEW * unit,
        "hand-over to another stage, us": 1e6 * hand_over_seconds([_CPU], 1, 0.0),
        "unit, us": unit,
    }


def _added(layers: list[nn.Module], stages: int, steps: int) -> float:
    """Seconds that stages on one device add to a step with a single micro-batch."""
    module = nn.Sequential(*layers)
    alone = _seconds(lambda: _step(module, torch.ones(1)), steps)
    pipeline = _pipelined(module, stages, devices=1, chunks=1)
    try:
        return _seconds(lambda: _step(pipeline, torch.ones(1)), steps) - alone
    finally:
        pipeline.close()


def _small_layers(steps: int) -> dict[str, float]:
    """A step of many small layers as a multiple of the ideal."""
    layers = [nn.TransformerEncoderLayer(128, 4, 256, 0.0, batch_first=True) for _ in range(24)]
    module, x = nn.Sequential(*layers), torch.randn(32, 16, 128)

    def alone() -> None:
        torch.cat([module(part) for part in x.chunk(8)]).square().mean().backward()

    pipeline = _pipelined(module, stages=2, devices=2, chunks=8)
    try:
        ideal = _seconds(alone, steps) / 2
        return {
            "24 small layers on 2 devices, of the ideal": ideal
            / _seconds(lambda: _step(pipeline, x), steps)
        }
    finally:
        pipeline.close()


def _step(module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    module(x).square().mean().backward()


def _pipelined(module: nn.Sequential, stages: int, devices: int, chunks: int) -> Pipeline:
    each = len(module) // stages
    return Pipeline(
        Cutter(module, module.forward, stages, [str(each * stage) for stage in range(1, stages)]),
        Splitter(),
        [_CPU] * stages,
        chunks=Chunks(devices, chunks),
        threads=1,
        stages_per_device=stages // devices,
    )


def _seconds(run: Callable[[], None], steps: int) -> float:
    """Median of a step, after as many to warm up."""
    taken = []
    for _ in range(2 * steps):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken[steps:])


if __name__ == "__main__":
    main()
