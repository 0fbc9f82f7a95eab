"""Seconds of a training step: the pipeline on two CPU stages, its limit and its peers.

Each round runs every way once, one after another, in a process of its own, on the same batch and
model; what is printed are medians over the rounds, their range, and the pipeline's throughput as a
multiple of each other's, taken round by round. The limit is the time of the same micro-batches one
after another in one thread, times (m + s - 1) / (m s): what two even stages could do without any
overhead. `torchgpipe` (pip install torchgpipe==0.0.7) is left out where it is not installed.
"""

import argparse
import importlib.util
import itertools
import json
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

from rounds import interleaved, print_throughputs

STAGES, CHUNKS, BATCH, WARM_UP = 2, 8, 1024, 2
WAYS = ("pipeline", "limit", "torchgpipe", "one thread", "all cores")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round (default 6)")
    parser.add_argument("--models", nargs="+", default=["mlp", "encoder"], help="(default: both)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="(default: all)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, steps=arguments.steps)))
        return
    ways = [way for way in arguments.ways if way != "torchgpipe" or _has_torchgpipe()]
    for model in arguments.models:
        steps = ("--steps", str(arguments.steps))
        seconds = interleaved(__file__, ways, arguments.rounds, model, *steps)
        print_throughputs(model, seconds, ours="pipeline")


def measure(way: str, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    if way != "all cores":
        torch.set_num_threads(1)
    if way == "limit":
        stamps = by_hand(*serial(model), steps)
    elif way == "torchgpipe":
        stamps = by_hand(*gpipe(model), steps)
    else:
        stamps = with_trainer(way, model, steps)
    each = [after - before for before, after in itertools.pairwise(stamps[WARM_UP:])]
    factor = (CHUNKS + STAGES - 1) / (CHUNKS * STAGES) if way == "limit" else 1.0
    return median(each) * factor


def build(model: str) -> tuple[Any, Any]:
    """Eight layers in a row, and a batch."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if model == "mlp":
        layers = [
            nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024)) for _ in range(8)
        ]
        return nn.Sequential(*layers), torch.randn(BATCH, 1024)
    encoder = [
        nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True) for _ in range(8)
    ]
    return nn.Sequential(*encoder), torch.randn(BATCH // 16, 64, 256)


def serial(model: str) -> tuple[Any, Callable[[], None]]:
    """Micro-batches one after another."""
    net, batch = build(model)
    chunks = batch.chunk(CHUNKS)

    def step() -> None:
        for chunk in chunks:
            (net(chunk).square().mean() / CHUNKS).backward()

    return net, step


def gpipe(model: str) -> tuple[Any, Callable[[], None]]:
    """The same in torchgpipe."""
    import torchgpipe

    net, batch = build(model)
    devices = ["cpu"] * STAGES
    net = torchgpipe.GPipe(net, [4, 4], devices=devices, chunks=CHUNKS, checkpoint="never")
    return net, lambda: net(batch).square().mean().backward()


def by_hand(net: Any, step: Callable[[], None], steps: int) -> list[float]:
    """The end of each step of a plain loop."""
    import torch

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    stamps = []
    for _ in range(WARM_UP + steps + 1):
        step()
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.perf_counter())
    return stamps


def with_trainer(way: str, model: str, steps: int) -> list[float]:
    """The end of each step of a Trainer."""
    import lightning.pytorch as pl
    import torch

    from lightning_mgpu import PipelineStrategy

    warnings.filterwarnings("ignore")
    stamps: list[float] = []
    net, batch = build(model)

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def on_train_batch_end(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    piped = way == "pipeline"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=STAGES if piped else 1,
        strategy=PipelineStrategy(split_at="net.4", chunks=CHUNKS) if piped else "auto",
        max_steps=WARM_UP + steps + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [batch] * (WARM_UP + steps + 1)
    trainer.fit(Lit(), torch.utils.data.DataLoader(batches, batch_size=None))
    return stamps


def _has_torchgpipe() -> bool:
    return importlib.util.find_spec("torchgpipe") is not None


if __name__ == "__main__":
    main()
