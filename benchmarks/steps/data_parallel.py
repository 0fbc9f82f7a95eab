"""`dp` beside one device, Lightning's `ddp` and a loop by hand.

All use as many cores as there are, unless their name says otherwise.
"""

import itertools
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

from rounds import QUIET, interleaved, print_throughputs

DEVICES = 2
WARM_UP = 4
MODELS = ("mlp", "conv", "transformer")
WAYS = ("dp", "one thread", "all cores", "ddp", "threads by hand")


def compare(
    script: str, rounds: int, steps: int, models: Sequence[str] | None, ways: Sequence[str] | None
) -> None:
    """Measure and print."""
    for model in models or MODELS:
        options = (model, "--only", "dp", "--steps", str(steps))
        print_throughputs(model, interleaved(script, ways or WAYS, rounds, *options), ours="dp")


def measure_here(way: str, model: str, steps: int) -> None:
    """In a fresh process: print the result as JSON, on one rank."""
    seconds = measure(way, model, steps)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(json.dumps(seconds))


def measure(way: str, model: str, steps: int) -> float:
    """Median seconds of a step."""
    import torch

    if way == "one thread":
        torch.set_num_threads(1)
    if way == "threads by hand":
        stamps = by_hand(model, steps)
    else:
        stamps = with_trainer({"dp": "dp", "ddp": "ddp"}.get(way, "auto"), model, steps)
    stamps = stamps[WARM_UP:]
    return median(after - before for before, after in itertools.pairwise(stamps))


def with_trainer(strategy: str, model: str, steps: int) -> list[float]:
    """The end of each step of a Trainer, in seconds of some clock."""
    import lightning.pytorch as pl
    from models.steps import Lit, loader

    from lightning_mgpu import DataParallelStrategy

    warnings.filterwarnings("ignore")
    stamps: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

    lit = Lit(model)
    count, *rest = lit.shape
    trainer = pl.Trainer(
        devices=1 if strategy == "auto" else DEVICES,
        strategy=DataParallelStrategy() if strategy == "dp" else strategy,
        max_steps=WARM_UP + steps + 1,
        callbacks=[Clock()],
        use_distributed_sampler=False,
        **QUIET,
    )
    each = count // DEVICES if strategy == "ddp" else count
    trainer.fit(lit, loader((each, *rest), WARM_UP + steps + 1))
    return stamps


def by_hand(model: str, steps: int) -> list[float]:
    """Two threads that each compute half the batch: the least that data parallel has to do."""
    import torch
    from models.steps import Batches, Lit, loss_of

    nets = [Lit(model).net for _ in range(DEVICES)]
    for parameter, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        other.data = parameter.data
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=1e-3)
    halves = Batches(Lit(model).shape, 1).batch.chunk(DEVICES)
    inboxes: list[queue.SimpleQueue[bool]] = [queue.SimpleQueue() for _ in nets]
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work(index: int) -> None:
        torch.get_num_threads()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // DEVICES))
        while inboxes[index].get():
            (loss_of(nets[index], halves[index]) / DEVICES).backward()
            done.put(None)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(DEVICES)]
    for thread in threads:
        thread.start()
    stamps = [step_by_hand(nets, optimizer, inboxes, done) for _ in range(WARM_UP + steps + 1)]
    for inbox in inboxes:
        inbox.put(False)
    for thread in threads:
        thread.join()
    return stamps


def step_by_hand(nets: Any, optimizer: Any, inboxes: Any, done: Any) -> float:
    """One step; returns when it ended."""
    import torch

    for inbox in inboxes:
        inbox.put(True)
    for _ in inboxes:
        done.get()
    first, second = ([parameter.grad for parameter in net.parameters()] for net in nets)
    torch._foreach_add_(first, second)
    optimizer.step()
    for net in nets:
        net.zero_grad()
    return time.perf_counter()
