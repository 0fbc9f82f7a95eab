"""Dropout on the GPU: seeded runs repeat, and what is computed again draws the same."""

from collections.abc import Callable
from typing import Any

import boring
import gpu_models as models
import lightning.pytorch as pl
import pytest
import torch
from gpu_runs import CPU, GPU, dp, fitted, pipeline

STRATEGIES: dict[str, Callable[..., Any]] = {
    "dp": lambda **kw: dp(GPU, GPU, **kw),
    "dp-cpu": lambda **kw: dp(GPU, CPU, **kw),
    "pipeline": lambda **kw: pipeline(GPU, GPU, **kw),
    "pipeline-cpu": lambda **kw: pipeline(CPU, GPU, **kw),
    "pipeline-2-stages": lambda **kw: pipeline(GPU, stages_per_device=2, **kw),
}


def _trained(strategy: Any, build: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    pl.seed_everything(11, verbose=False)
    model = build()
    fitted(strategy, model, test=False)
    return model


@pytest.mark.parametrize("build", [models.Dropout, models.DropoutAgain, models.Attention])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeded_runs_repeat_bit_for_bit(
    strategy: str, build: Callable[[], pl.LightningModule]
) -> None:
    once, again = (_trained(STRATEGIES[strategy](), build) for _ in range(2))
    boring.assert_same_weights(once, again, 0)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "pipeline" in name])
@pytest.mark.parametrize("build", [models.Dropout, models.Attention])
def test_recomputation_draws_the_same(
    strategy: str, build: Callable[[], pl.LightningModule]
) -> None:
    kept = _trained(STRATEGIES[strategy](checkpoint="never"), build)
    again = _trained(STRATEGIES[strategy](checkpoint="always"), build)
    boring.assert_same_weights(kept, again, 1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_activation_checkpointing_draws_the_same(strategy: str) -> None:
    kept = _trained(STRATEGIES[strategy](), models.Dropout)
    again = _trained(STRATEGIES[strategy](), models.DropoutAgain)
    boring.assert_same_weights(
        torch.nn.ParameterList(kept.parameters()), torch.nn.ParameterList(again.parameters()), 1e-9
    )


@pytest.mark.parametrize("devices", [(GPU, GPU), (GPU, CPU)], ids=["gpus", "both"])
def test_batch_normalisation_within_activation_checkpointing(
    devices: tuple[torch.device, ...],
) -> None:
    class Normalised(models.DropoutAgain):
        rate = 0.0

        def build(self) -> torch.nn.Module:
            net = super().build()
            for part in net[:3]:
                part.layers[1] = torch.nn.BatchNorm1d(6, dtype=torch.float64)
            return net

    once, again = (_trained(dp(*devices), Normalised) for _ in range(2))
    boring.assert_same_weights(once, again, 0)
