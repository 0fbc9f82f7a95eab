"""Against Lightning with one GPU: weights, metrics and predictions, in float64."""

from collections.abc import Callable
from typing import Any

import boring
import gpu_models as models
import parity_models
import pytest
import torch
from gpu_runs import CPU, GPU, ON_GPU, TOLERANCE, assert_like_one_device, dp, pipeline
from lightning.pytorch import LightningModule

# What a slot computes with: aliases of the master's parameters, or copies in memory of its own.
DP = {
    "gpu-gpu": (GPU, GPU),
    "gpu-gpu-gpu": (GPU, GPU, GPU),
    "gpu-cpu": (GPU, CPU),
    "cpu-gpu": (CPU, GPU),
}
PIPELINES: dict[str, tuple[tuple[torch.device, ...], dict[str, Any]]] = {
    "gpu-gpu": ((GPU, GPU), {}),
    "gpu-gpu-except_last": ((GPU, GPU), {"checkpoint": "except_last"}),
    "gpu-gpu-always": ((GPU, GPU), {"checkpoint": "always"}),
    "cpu-gpu": ((CPU, GPU), {}),
    "cpu-gpu-always": ((CPU, GPU), {"checkpoint": "always"}),
    "gpu-cpu": ((GPU, CPU), {}),
    "gpu-2-stages": ((GPU,), {"stages_per_device": 2}),
    # Which products are large enough depends on the GPU.
    "gpu-gpu-deferred": ((GPU, GPU), {"defer_weight_gradients": True}),
    "cpu-gpu-deferred": ((CPU, GPU), {"defer_weight_gradients": True}),
}
CASES: dict[str, tuple[Callable[[], LightningModule], dict[str, Any]]] = {
    "adam": (lambda: boring.Classifier("adam", scheduler=True), {}),
    "accumulated": (
        lambda: boring.Classifier("adam"),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
    **{model.__name__: (model, {}) for model in parity_models.MODELS},
    **{model.__name__: (model, {}) for model in parity_models.UNPICKLABLE_MODELS},
    "UNet": (parity_models.UNet, {}),
    "Dictionaries": (parity_models.Dictionaries, {}),
}
_NOT_IN_STAGES = ("GradientPenalty", "SpectralNorm")  # (changes buffers with each micro-batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("devices", DP)
def test_data_parallel(devices: str, case: str) -> None:
    build, kwargs = CASES[case]
    assert_like_one_device(dp(*DP[devices]), build, tolerance=_tolerance(devices, case), **kwargs)


@pytest.mark.parametrize("case", [case for case in CASES if case not in _NOT_IN_STAGES])
@pytest.mark.parametrize("devices", PIPELINES)
def test_pipeline(devices: str, case: str) -> None:
    build, kwargs = CASES[case]
    on, options = PIPELINES[devices]
    strategy = pipeline(*on, **options)
    assert_like_one_device(strategy, build, tolerance=_tolerance(devices, case), **kwargs)


def _tolerance(devices: str, case: str) -> float:
    # torch's kernel for it computes norms in single precision on CUDA, and in double on the CPU.
    return 1e-6 if case == "WeightNorm" and "cpu" in devices else TOLERANCE


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize("devices", [(GPU, GPU, GPU), (CPU, GPU, CPU)], ids=["gpus", "both"])
def test_three_stages_with_skips_over_the_cut(
    devices: tuple[torch.device, ...], checkpoint: str
) -> None:
    strategy = pipeline(*devices, checkpoint=checkpoint, split_at=["net.up.0", "net.up.2"])
    assert_like_one_device(strategy, parity_models.UNet)


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "strategy",
    [
        lambda: dp(GPU, GPU),
        lambda: dp(GPU, CPU),
        lambda: pipeline(GPU, GPU),
        lambda: pipeline(CPU, GPU),
    ],
    ids=["dp", "dp-cpu", "pipeline", "pipeline-cpu"],
)
def test_images(strategy: Callable[[], Any], layout: torch.memory_format, pinned: bool) -> None:
    pinned = pinned and ON_GPU
    assert_like_one_device(
        strategy(), models.FrozenStatistics, lambda: models.images(layout=layout, pinned=pinned)
    )


@pytest.mark.parametrize("side", [False, True], ids=["current", "side"])
@pytest.mark.parametrize("strategy", [dp, pipeline])
def test_work_is_in_the_stream_of_the_caller(strategy: Any, side: bool) -> None:
    if not ON_GPU:
        pytest.skip("the CPU has no streams")
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        assert_like_one_device(strategy(GPU, GPU), lambda: boring.Classifier("adam"))
