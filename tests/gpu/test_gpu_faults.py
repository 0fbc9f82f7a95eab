"""Out of memory, errors and Ctrl-C with work under way on the GPU."""

import gc
import os
import signal
import threading
import time
from typing import Any

import boring
import parity_models
import pytest
import torch
from gpu_runs import GPU, ON_GPU, dp, fitted, pipeline, used
from torch import Tensor, nn

FAR = 30.0  # seconds

STRATEGIES = {
    "dp": lambda: dp(GPU, GPU),
    "pipeline": lambda: pipeline(GPU, GPU, split_at="net.2"),
}
PLACES = {"dp": "replica 1 of 2 on", "pipeline": "stage 1 of 2 on"}


class Fault(Exception):
    """Of the user's own."""


class Breaking(nn.Module):
    """Does something in the last replica, or the last stage, while it is trained."""

    kind = "none"
    is_layer_of_a_stage = False

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "backward":
            return _BreakingBackward.apply(x)
        here = self.is_layer_of_a_stage or threading.current_thread().name.endswith("-1")
        if self.kind != "none" and self.training and here:
            getattr(self, self.kind)(x)
        return x

    def take_all_memory(self, x: Tensor) -> None:
        if not ON_GPU:
            raise torch.OutOfMemoryError("out of memory")
        total = torch.cuda.get_device_properties(GPU).total_memory
        held = torch.empty(total * 2, dtype=torch.uint8, device=GPU)
        x.add_(held[0])

    def interrupt(self, x: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + FAR
        while time.monotonic() < deadline:
            (x @ x.T).sum().item()


class _BreakingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Fault("in backward")  # the user's line


class Model(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), Breaking(), nn.Linear(64, 3)
        )


def _broken(kind: str, strategy: str) -> Model:
    model = Model()
    model.net[3].kind = kind
    model.net[3].is_layer_of_a_stage = strategy == "pipeline"
    return model


def _assert_recovers(strategy: str, model: Model) -> None:
    model.zero_grad()
    model.cpu()
    model.net[3].kind = "none"
    fitted(STRATEGIES[strategy](), model)


@pytest.fixture
def back_to_normal() -> Any:
    gc.collect()
    before = used()
    yield
    gc.collect()
    assert used() <= before + 2**20  # (a workspace of cuBLAS aside)
    assert not [t for t in threading.enumerate() if t.name.startswith("mgpu-worker")]


@pytest.mark.usefixtures("back_to_normal")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_out_of_memory_keeps_its_type_and_says_where(strategy: str) -> None:
    fitted(STRATEGIES[strategy](), Model())  # (what the GPU's libraries keep is there)
    before = used()
    model = _broken("take_all_memory", strategy)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fitted(STRATEGIES[strategy](), model)
    notes = " ".join(getattr(raised.value, "__notes__", []))
    assert f"{PLACES[strategy]} {GPU}" in notes
    del raised
    gc.collect()
    model.zero_grad()
    model.cpu()
    assert used() <= before + 2**20
    _assert_recovers(strategy, model)


@pytest.mark.usefixtures("back_to_normal")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_error_in_backward(strategy: str) -> None:
    model = _broken("backward", strategy)
    started = time.monotonic()
    with pytest.raises(Fault, match="in backward") as raised:
        fitted(STRATEGIES[strategy](), model)
    assert time.monotonic() - started < FAR
    notes = " ".join(getattr(raised.value, "__notes__", []))
    assert f" of 2 on {GPU}" in notes
    assert "in backward" in notes
    del raised
    _assert_recovers(strategy, model)


@pytest.mark.usefixtures("back_to_normal")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ctrl_c(strategy: str) -> None:
    model = _broken("interrupt", strategy)
    started = time.monotonic()
    # (Lightning turns the first Ctrl-C into an exit.)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitted(STRATEGIES[strategy](), model, data=boring.Blobs(12, 48))
    assert time.monotonic() - started < FAR
    _assert_recovers(strategy, model)
