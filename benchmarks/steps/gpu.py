"""What `gpu.py` measures: each part prints a JSON object a line."""

import gc
import json
import logging
import platform
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_mgpu
from lightning_mgpu import DataParallelStrategy, PipelineStrategy
from lightning_mgpu.engine.device import copied
from lightning_mgpu.plan.options import Options
from lightning_mgpu.plan.predict import predict
from lightning_mgpu.plan.rehearsal import Rehearsal

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
STAGES, CHUNKS = 2, 4
WARM_UP, STEPS = 5, 20
QUIET: dict[str, Any] = {
    "accelerator": "gpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
}
WAYS: dict[str, Callable[[], Any]] = {
    "alone": lambda: "auto",
    "dp": lambda: DataParallelStrategy(parallel_devices=[GPU] * 2),
    "pipeline": lambda: PipelineStrategy(parallel_devices=[GPU] * STAGES, chunks=CHUNKS),
}
# How often a step hands work to a slot: forward and backward, of each shard or micro-batch.
TASKS = {"dp": 2 * 2, "pipeline": 2 * STAGES * CHUNKS}
GIB = 2**30


def _print(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Lit(pl.LightningModule):
    """A module with a mean squared error."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        self.net = net
        self._optimizer = optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.parameters(), lr=1e-4)


class Stopwatch(Callback):
    """Mean seconds of the steps after the first, and the most memory they took."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self._warm_up, self._steps = warm_up, steps
        self.seconds, self.peak = float("nan"), 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._done = getattr(self, "_done", -1) + 1
        if self._done == self._warm_up:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._started = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.seconds = (time.perf_counter() - self._started) / self._steps
        self.peak = torch.cuda.max_memory_allocated()


def _timed(
    strategy: Any, module: pl.LightningModule, batch: Any, warm_up: int, steps: int, **kwargs: Any
) -> Stopwatch:
    watch = Stopwatch(warm_up, steps)
    trainer = pl.Trainer(
        strategy=strategy, max_steps=warm_up + steps, callbacks=[watch], **QUIET, **kwargs
    )
    trainer.fit(module, _repeated(batch))
    return watch


def _repeated(batch: Any) -> DataLoader[Any]:
    return DataLoader([batch] * 100, batch_size=None)


def _print_machine() -> None:
    properties = torch.cuda.get_device_properties(GPU)
    _print(
        gpu=properties.name,
        memory_gib=round(properties.total_memory / GIB, 1),
        python=platform.python_version(),
        torch=torch.__version__,
        lightning=pl.__version__,
        lightning_mgpu=lightning_mgpu.__version__,
    )


def launch_bound() -> tuple[nn.Module, Any, dict[str, Any]]:
    """Many small kernels: a step is as long as it takes to launch them."""
    layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(24)]
    batch = torch.randn(64, 256), torch.randn(64, 256)
    return nn.Sequential(*layers), [t.pin_memory() for t in batch], {}


def compute_bound() -> tuple[nn.Module, Any, dict[str, Any]]:
    """Encoder layers in bfloat16, whose kernels keep the GPU busy for longer."""
    layers = [nn.TransformerEncoderLayer(2048, 16, 8192, 0.0, batch_first=True) for _ in range(8)]
    batch = torch.randn(16, 1024, 2048), torch.randn(16, 1024, 2048)
    return nn.Sequential(*layers), [t.pin_memory() for t in batch], {"precision": "bf16-mixed"}


def steps(arguments: Namespace) -> None:
    """Seconds of a step, with everything on one GPU: what our strategies add."""
    _quiet()
    _print_machine()
    for build in (launch_bound, compute_bound):
        net, batch, kwargs = build()
        module = Lit(net)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, strategy in WAYS.items():
                found[way].append(
                    _timed(strategy(), module, batch, WARM_UP, STEPS, **kwargs).seconds
                )
        for way, seconds in found.items():
            ratios = [own / alone for own, alone in zip(seconds, found["alone"], strict=True)]
            row = {"model": build.__name__, "way": way, "seconds": _spread(seconds)}
            if way in TASKS:
                more = [s - a for s, a in zip(seconds, found["alone"], strict=True)]
                row["to_alone"] = _spread(ratios)
                row["microseconds_a_task"] = _spread([m / TASKS[way] * 1e6 for m in more])
            _print(**row)


def copies(arguments: Namespace) -> None:
    """GB/s of copies of 64 MiB, as the batch and what stages hand over take them."""
    host = torch.randn(2**24)
    here = torch.randn(2**24, device=GPU)
    for name, source, target in (
        ("pageable to gpu", host, GPU),
        ("pinned to gpu", host.pin_memory(), GPU),
        ("gpu to host", here, CPU),
    ):
        rates = []
        for _ in range(arguments.rounds * 2 + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            copied(source, target)
            torch.cuda.synchronize()
            rates.append(source.nbytes / (time.perf_counter() - started) / 1e9)
        _print(copy=name, gb_per_second=_spread(rates[2:]))


class Block(nn.Module):
    """A decoder layer, with PyTorch's attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Language(pl.LightningModule):
    """A decoder that predicts the next token; 1.3 B parameters with 24 layers."""

    def __init__(self, layers: int, dim: int = 2048, vocabulary: int = 32000) -> None:
        super().__init__()
        with GPU:
            self.net = nn.Sequential(
                nn.Embedding(vocabulary, dim),
                *(Block(dim, 16) for _ in range(layers)),
                nn.LayerNorm(dim),
                nn.Linear(dim, vocabulary, bias=False),
            )

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=False)


def large(arguments: Namespace) -> None:
    """Time and memory of a step, predicted and measured, alone and in two stages on the GPU."""
    _quiet()
    module = Language(arguments.layers)
    count = sum(p.numel() for p in module.parameters())
    _print(parameters=count)
    tokens = torch.randint(32000, (8, 1025)).pin_memory()
    for precision in arguments.precisions:
        predicted = {}
        if precision == "bf16-mixed":
            predicted = _predicted(module, tokens, precision)
        ways: dict[str, Any] = {"alone": "auto"}
        for checkpoint in ("never", "except_last", "always"):
            ways[checkpoint] = PipelineStrategy(
                parallel_devices=[GPU] * STAGES, chunks=CHUNKS, checkpoint=checkpoint
            )
        for way, strategy in ways.items():
            module.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            seconds, peaks = [], []
            for _ in range(arguments.repeats):
                watch = _timed(strategy, module, tokens, 2, 4, precision=precision)
                seconds.append(watch.seconds)
                peaks.append(watch.peak / GIB)
            _print(
                precision=precision,
                way=way,
                seconds=_spread(seconds),
                peak_gib=_spread(peaks),
                **predicted.get(way, {}),
            )


def _predicted(module: pl.LightningModule, tokens: Tensor, precision: str) -> dict[str, Any]:
    """By `mode=plan`: memory of both stages together, and seconds as if each had a GPU."""
    options = Options(
        stages=[STAGES],
        chunks=[CHUNKS],
        replicas=[1],
        checkpoint=["never", "except_last", "always"],
        bandwidth=1e12,
        latency=0.0,
    )
    rehearsal = Rehearsal(parallel_devices=[GPU])
    rehearsal.prepare(options)
    started = time.perf_counter()
    pl.Trainer(strategy=rehearsal, precision=precision, **QUIET).fit(module, _repeated(tokens))
    rows = predict(rehearsal.profile(), options).rows
    _print(planning_seconds=round(time.perf_counter() - started, 1))
    return {
        row.checkpoint: {
            "predicted_gib": sum(row.memory_of_devices) / GIB,
            "predicted_seconds_with_two_gpus": row.seconds,
        }
        for row in rows
    }


def _spread(values: Sequence[float]) -> list[float]:
    return [median(values), min(values), max(values)]


PARTS = {"steps": steps, "copies": copies, "large": large}
