"""Measure what it takes to hand a micro-batch on to another stage."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.device import synchronize
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks

# Stages that are gone through, and how often; of the times after the first, the quickest counts.
_STAGES, _TIMES = 8, 5


class _Scaled(nn.Module):
    """As little as a stage with a gradient can do."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def hand_over_seconds(devices: Sequence[torch.device], threads: int | None, size: float) -> float:
    """Measure the seconds, forward and backward, of handing a micro-batch on to another stage.

    Args:
        devices: The devices that take turns.
        threads: Intra-op threads of each.
        size: Bytes of what is handed on.
    """
    around = max(1, _STAGES // len(devices))
    stages = around * len(devices)
    many = _through(devices, around, threads, stages)
    alone = _through(devices[:1], 1, threads, stages)
    sent = torch.empty(round(size), dtype=torch.uint8, device=devices[0])
    copied = _quickest(devices, lambda: sent.to(devices[1 % len(devices)]))
    return max(0.0, many - alone) / max(1, stages - 1) + 2 * copied


def _through(
    devices: Sequence[torch.device], around: int, threads: int | None, layers: int
) -> float:
    """Seconds of one micro-batch, forward and backward, through stages that do nothing."""
    where = [*devices] * around
    stages = len(where)
    module = nn.Sequential(*(_Scaled(where[layer % stages]) for layer in range(layers)))
    pipeline = Pipeline(
        Cutter(module, module.forward, stages, [str(layer) for layer in range(1, stages)]),
        Splitter(),
        where,
        chunks=Chunks(len(devices), 1),
        threads=threads,
        stages_per_device=around,
        defer_weight_gradients=False,
    )
    try:
        return _quickest(devices, lambda: pipeline(torch.ones(1, device=where[0])).backward())
    finally:
        pipeline.close()


def _quickest(devices: Sequence[torch.device], run: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TIMES):
        synchronize(devices)
        started = time.perf_counter()
        run()
        synchronize(devices)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
