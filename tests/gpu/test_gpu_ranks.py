"""Processes that share the GPU."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import boring
import parity_models
import pytest
import torch
from gpu_runs import (
    BATCH,
    GPU,
    ON_GPU,
    SIZE,
    STEPS,
    TOLERANCE,
    close,
    fitted,
    predictions,
    ranks,
    trainer,
)
from torch import Tensor

from lightning_mgpu import PipelineDDPStrategy
from lightning_mgpu.launch.errors import RankHungError, WorkerDiedError

FAR = 60.0  # seconds

pytestmark = pytest.mark.slow


def _same_as_alone(strategy: Any, processes: int, build: Any) -> None:
    alone, together = build(), build()
    expected = fitted("auto", alone)
    data = boring.Blobs(BATCH // processes, SIZE, world_size=processes)
    run = fitted(strategy, together, data)
    assert run.global_step == expected.global_step == STEPS
    boring.assert_same_weights(alone, together)
    for name, value in expected.callback_metrics.items():
        close(run.callback_metrics[name], value, TOLERANCE)


@pytest.mark.parametrize(
    "build", [lambda: boring.Classifier("adam", scheduler=True), parity_models.Recurrent]
)
def test_two_ranks(build: Any) -> None:
    _same_as_alone(ranks(), 2, build)


def test_one_rank_over_nccl() -> None:
    _same_as_alone(ranks(1, "nccl" if ON_GPU else "gloo"), 1, boring.Classifier)


def test_two_ranks_with_two_stages_each() -> None:
    strategy = PipelineDDPStrategy(
        parallel_devices=[GPU] * 4, stages=2, chunks=2, process_group_backend="gloo"
    )
    _same_as_alone(strategy, 2, lambda: boring.Classifier("adam"))


class Table(boring.Classifier):
    """Holds a tensor on the GPU that is no buffer, and predicts with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(3.0, dtype=torch.float64, device=GPU)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.table.device == self.device
        return self(batch[0]) + self.table


def test_tensors_of_the_gpu_travel_and_predictions_come_back() -> None:
    alone, together = Table(), Table()
    data = boring.Blobs(BATCH, SIZE)
    expected = torch.cat([*predictions(trainer("auto"), alone, data)])
    run = trainer(ranks(), use_distributed_sampler=True)
    found = torch.cat([*predictions(run, together, boring.Blobs(BATCH // 2, SIZE))])
    close(found, expected, TOLERANCE)


class Fault(boring.Classifier):
    kind = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            getattr(self, self.kind)()
        return super().training_step(batch, batch_idx)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(3600)

    def fail(self) -> None:
        raise ArithmeticError("rank 1 cannot count")

    def run_out(self) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=GPU)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("die", WorkerDiedError),
        ("hang", RankHungError),
        ("fail", ArithmeticError),
        ("run_out", torch.OutOfMemoryError if ON_GPU else RuntimeError),
    ],
)
def test_rank_that_fails(kind: str, error: type[Exception]) -> None:
    class Here(Fault):
        pass

    Here.kind = kind
    started = time.monotonic()
    with pytest.raises(error):
        fitted(ranks(timeout=timedelta(seconds=8)), Here(), boring.Blobs(6, 48, world_size=2))
    assert time.monotonic() - started < FAR
    fitted(ranks(), boring.Classifier(), boring.Blobs(6, 48, world_size=2), max_steps=2)


_PROGRAM = """
import sys; sys.path[:0] = {path!r}
import boring, gpu_runs as runs, torch
assert torch.cuda.device_count() == 1
model = boring.Classifier()
runs.fitted(runs.ranks(), model, boring.Blobs(6, 48, world_size=2), max_steps=2)
print("trained", float(model.net[0].weight.sum()))
"""


def test_visible_devices_hold_for_ranks() -> None:
    if not ON_GPU:
        pytest.skip("the CPU is always visible")
    name = torch.cuda.get_device_properties(GPU).uuid
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(path=[str(Path(__file__).parent), *sys.path])],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": f"GPU-{name}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "trained" in done.stdout, done.stderr
