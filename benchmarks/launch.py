"""What it costs to start a run on two processes: ours beside Lightning's `ddp` and `ddp_spawn`.

``python benchmarks/launch.py`` starts fresh Python processes, in turns, and in each calls `fit`
for one step several times over. The first call is *cold* (it starts the other rank), the others
are *later* calls. Printed are medians with their range, and the median over the rounds of the
ratio to stock `ddp` of the same round. Then 50 launches in a row are watched for growth.
"""

import argparse
import json
import logging
import os
import threading
import time
import warnings
from statistics import median

from rounds import QUIET, interleaved, spread

STRATEGIES = ("mgpu_ddp", "ddp", "ddp_spawn")
SIZES = {"small": 8, "100 MB": 5000}  # features of one square float32 layer
LATER_CALLS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--launches", type=int, default=50, help="launches watched for growth")
    parser.add_argument(
        "--child", nargs=2, metavar=("STRATEGY", "FEATURES"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.child:
        strategy, features = arguments.child
        times = [fit(strategy, int(features)) for _ in range(1 + LATER_CALLS)]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(json.dumps(times))
        return
    for name, features in SIZES.items():
        measure(name, features, arguments.rounds)
    watch_growth(arguments.launches)


def measure(name: str, features: int, rounds: int) -> None:
    """Print one table: every strategy, cold and later calls."""
    calls = interleaved(__file__, STRATEGIES, rounds, str(features))
    cold = {strategy: [first for first, *_ in found] for strategy, found in calls.items()}
    later = {
        strategy: [median(others) for _, *others in found] for strategy, found in calls.items()
    }
    print(f"\n{name} model, {rounds} rounds; seconds per call, ratio to stock ddp")
    for kind, times in (("cold", cold), ("later", later)):
        for strategy in STRATEGIES:
            ratios = [a / b for a, b in zip(times[strategy], times["ddp"], strict=True)]
            print(f"  {kind:6}{strategy:10}{spread(times[strategy])}   ratio {spread(ratios)}")


def fit(strategy: str, features: int) -> float:
    """Seconds that one `Trainer.fit` of a single step takes, with a new Trainer and model."""
    import lightning.pytorch as pl
    import torch
    from models.one_layer import OneLayer
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_mgpu  # noqa: F401

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        devices=2,
        strategy=strategy,
        max_steps=1,
        **QUIET,
    )
    model = OneLayer(features)
    data = DataLoader(TensorDataset(torch.ones(4, features)), batch_size=2)
    started = time.perf_counter()
    trainer.fit(model, data)
    return time.perf_counter() - started


def watch_growth(launches: int) -> None:
    """Print threads, descriptors and memory before and after many launches."""
    import psutil

    from lightning_mgpu.launch.pool import default_pool

    def state() -> tuple[int, int, float]:
        family = [psutil.Process(), *map(psutil.Process, default_pool().pids)]
        memory = sum(process.memory_info().rss for process in family)
        descriptors = sum(process.num_fds() for process in family)
        return threading.active_count(), descriptors, memory / 2**20

    for _ in range(5):
        fit("mgpu_ddp", SIZES["small"])
    before = state()
    for _ in range(launches):
        fit("mgpu_ddp", SIZES["small"])
    after = state()
    print(f"\n{launches} launches, both processes: before -> after")
    for name, old, new in zip(("threads", "descriptors", "MiB"), before, after, strict=True):
        print(f"  {name:12}{old:.0f} -> {new:.0f}")


if __name__ == "__main__":
    main()
