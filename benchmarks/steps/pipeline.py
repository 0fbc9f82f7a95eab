"""The pipeline on two CPU devices beside its ideal, other pipelines and one device.

The ideal is the time of the same micro-batches one after another in one thread, over the number of
devices: no schedule without a bubble or overhead could do better. `torchgpipe`
(pip install torchgpipe==0.0.7) is left out where it is not installed.
"""

import importlib.util
import itertools
import json
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rounds import QUIET, interleaved, print_throughputs

from steps import gloo

STAGES, CHUNKS, WARM_UP = 2, 8, 2
CUT = "net.4"
MODELS = ("mlp", "encoder")
# Of `torch.distributed.pipelining`, in two processes over gloo.
SCHEDULES = {
    "gloo gpipe": "GPipe",
    "gloo 1f1b": "1F1B",
    "gloo looped bfs": "LoopedBFS",
    "gloo interleaved 1f1b": "Interleaved1F1B",
    "gloo interleaved zb": "InterleavedZeroBubble",
    "gloo zbv": "ZBVZeroBubble",
}
PIPELINES: dict[str, dict[str, Any]] = {
    "pipeline": {},
    "pipeline, whole": {"defer_weight_gradients": False},
    "pipeline, 2 a device": {"stages_per_device": 2, "split_at": ["net.2", "net.4", "net.6"]},
}
WAYS = (*PIPELINES, "ideal", "torchgpipe", *SCHEDULES, "one thread", "all cores")


def compare(
    script: str, rounds: int, steps: int, models: Sequence[str] | None, ways: Sequence[str] | None
) -> None:
    """Measure and print."""
    chosen = [way for way in ways or WAYS if way != "torchgpipe" or _has_torchgpipe()]
    for model in models or MODELS:
        options = (model, "--only", "pipeline", "--steps", str(steps))
        print_throughputs(model, interleaved(script, chosen, rounds, *options), ours="pipeline")


def measure_here(way: str, model: str, steps: int) -> None:
    """In a fresh process: print the result as JSON."""
    print(json.dumps(measure(way, model, steps)))


def measure(way: str, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    if way != "all cores":
        torch.set_num_threads(1)
    if way == "ideal":
        stamps = by_hand(*serial(model), steps)
    elif way == "torchgpipe":
        stamps = by_hand(*gpipe(model), steps)
    elif way in SCHEDULES:
        stamps = gloo.stamps(SCHEDULES[way], model, CHUNKS, WARM_UP + steps + 1)
    else:
        chunks = CHUNKS if way in PIPELINES else None
        stamps = with_trainer(model, steps, chunks, **PIPELINES.get(way, {}))
    each = [after - before for before, after in itertools.pairwise(stamps[WARM_UP:])]
    return median(each) / (STAGES if way == "ideal" else 1)


def serial(model: str) -> tuple[Any, Callable[[], None]]:
    """Micro-batches one after another."""
    from models.rows import build

    net, batch = build(model)
    chunks = batch.chunk(CHUNKS)

    def step() -> None:
        for chunk in chunks:
            (net(chunk).square().mean() / CHUNKS).backward()

    return net, step


def gpipe(model: str) -> tuple[Any, Callable[[], None]]:
    """The same in torchgpipe."""
    import torchgpipe
    from models.rows import build

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


def lit(model: str, stamps: list[float]) -> tuple[Any, Any]:
    """A LightningModule that notes the end of each step, and a batch for it."""
    import lightning.pytorch as pl
    import torch
    from models.rows import build

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

    return Lit(), batch


def with_trainer(model: str, steps: int, chunks: int | None, **options: Any) -> list[float]:
    """The end of each step of a Trainer, with that many micro-batches or on one device."""
    import lightning.pytorch as pl
    import torch

    from lightning_mgpu import PipelineStrategy

    warnings.filterwarnings("ignore")
    stamps: list[float] = []
    module, batch = lit(model, stamps)
    strategy: Any = "auto"
    if chunks:
        strategy = PipelineStrategy(**{"split_at": CUT, "chunks": chunks, **options})
    trainer = pl.Trainer(
        devices=STAGES if chunks else 1,
        strategy=strategy,
        max_steps=WARM_UP + steps + 1,
        **QUIET,
    )
    batches = [batch] * (WARM_UP + steps + 1)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return stamps


def _has_torchgpipe() -> bool:
    return importlib.util.find_spec("torchgpipe") is not None
