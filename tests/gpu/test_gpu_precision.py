"""Mixed precision and compiled parts, on the GPU."""

from collections.abc import Callable
from typing import Any

import boring
import gpu_models as models
import pytest
import torch
from gpu_runs import GPU, ON_GPU, assert_like_one_device, dp, fitted, pipeline
from torch import Tensor, nn

STRATEGIES: dict[str, Callable[[], Any]] = {
    "dp": lambda: dp(GPU, GPU),
    "pipeline": lambda: pipeline(GPU, GPU),
    "pipeline-always": lambda: pipeline(GPU, GPU, checkpoint="always"),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_precision(strategy: str, precision: str) -> None:
    tolerance = 1e-5 if precision == "32-true" else 0.1
    options = {"precision": precision, "max_steps": 4}
    assert_like_one_device(
        STRATEGIES[strategy](), models.SinglePrecision, tolerance=tolerance, **options
    )


class Overflowing(models.SinglePrecision):
    """Whose gradients are infinite in one step, which the scaler is to leave out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.trainer.global_step == 1 and not self.seen else loss

    seen = False

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = self.seen or self.trainer.global_step == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_scaler_leaves_out_steps_with_infinite_gradients(strategy: str) -> None:
    if not ON_GPU:
        pytest.skip("the CPU has no `16-mixed`")
    scales = []
    for chosen in ("auto", STRATEGIES[strategy]()):
        run = fitted(chosen, Overflowing(), precision="16-mixed", test=False)
        scaler = run.precision_plugin.scaler
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] < 65536


class PartlyCompiled(boring.Classifier):
    """A layer of each stage is compiled in place."""

    def __init__(self, compiled: bool) -> None:
        super().__init__("adam")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Sequential(nn.Linear(6, 16), nn.GELU()),
                nn.Sequential(nn.Linear(16, 16), nn.GELU()),
                nn.Linear(16, 3),
            ).double()
        if compiled:
            self.net[0].compile(dynamic=True)
            self.net[1].compile(dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dp", "pipeline"])
def test_compiled_parts(strategy: str) -> None:
    torch.compiler.reset()
    together, alone = PartlyCompiled(True), PartlyCompiled(False)
    fitted(STRATEGIES[strategy](), together)
    fitted("auto", alone)
    boring.assert_same_weights(alone, together, 1e-7)
