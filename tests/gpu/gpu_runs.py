"""Training on one GPU: by Lightning alone, and with a list of devices that has it several times."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import boring
import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mgpu import DataParallelStrategy, DDPStrategy, PipelineStrategy

GPU = torch.device(os.environ.get("MGPU_DEVICE", "cuda:0"))
CPU = torch.device("cpu")
ON_GPU = GPU.type == "cuda"
SIZE, BATCH, STEPS = 48, 12, 8
TOLERANCE = 1e-9


def dp(*devices: torch.device, **kwargs: Any) -> DataParallelStrategy:
    return DataParallelStrategy(parallel_devices=list(devices), **kwargs)


def pipeline(*devices: torch.device, chunks: int = 4, **kwargs: Any) -> PipelineStrategy:
    return PipelineStrategy(parallel_devices=list(devices), chunks=chunks, **kwargs)


def ranks(count: int = 2, backend: str = "gloo", **kwargs: Any) -> DDPStrategy:
    """Of one GPU each, the same one."""
    return DDPStrategy(parallel_devices=[GPU] * count, process_group_backend=backend, **kwargs)


def trainer(strategy: Any = "auto", **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer; of one device, if the strategy has no list of its own."""
    devices = getattr(strategy, "parallel_devices", None) or [GPU]
    quiet: dict[str, Any] = {
        "accelerator": "cpu" if devices[0] == CPU else "gpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_epochs": -1,
    }
    if not {"max_steps", "max_epochs"} & kwargs.keys():
        kwargs["max_steps"] = STEPS
    return pl.Trainer(strategy=strategy, **{**quiet, **kwargs})


def fitted(
    strategy: Any, model: pl.LightningModule, data: Any = None, test: bool = True, **kwargs: Any
) -> pl.Trainer:
    run = trainer(strategy, **kwargs)
    data = boring.Blobs(BATCH, SIZE) if data is None else data
    run.fit(model, data)
    if test:
        run.test(model, data, verbose=False)
    return run


def assert_like_one_device(
    strategy: Any,
    build: Callable[[], pl.LightningModule],
    data: Callable[[], Any] = lambda: boring.Blobs(BATCH, SIZE),
    tolerance: float = TOLERANCE,
    **kwargs: Any,
) -> None:
    """The same weights, metrics and predictions as Lightning with the one GPU."""
    alone, together = build(), build()
    torch.manual_seed(3)
    expected = fitted("auto", alone, data(), **kwargs)
    metrics = dict(expected.callback_metrics)
    wanted = predictions(expected, alone, data())
    torch.manual_seed(3)
    found = fitted(strategy, together, data(), **kwargs)
    assert found.global_step == expected.global_step
    boring.assert_same_weights(alone, together, tolerance)
    assert found.callback_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        close(found.callback_metrics[name], value, tolerance)
    for one, other in zip(predictions(found, together, data()), wanted, strict=True):
        close(one, other, tolerance)


def predictions(run: pl.Trainer, model: pl.LightningModule, data: Any) -> Sequence[Tensor]:
    batches = run.predict(model, data)
    assert batches
    return [batch for batch in batches if isinstance(batch, Tensor)]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=tolerance)


def used() -> int:
    """Bytes that tensors have on the GPU."""
    return torch.cuda.memory_allocated() if ON_GPU else 0
