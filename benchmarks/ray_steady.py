"""What training on two Ray workers costs once it runs, and what it takes to bring 1 GB home.

``python benchmarks/ray_steady.py`` times the steps of one model under `RayStrategy` and under
Lightning's ``ddp``, in turns, in fresh processes: the median step on rank 0, without the first
and the last tenth. Then warm `fit` calls of one step on 1 GB of weights: how long the call takes,
how long of it the weights are under way after the workers' `fit` has ended, and how much memory of
its own the driver had at most, beside the model and Ray's store.
"""

import argparse
import json
import logging
import os
import re
import tempfile
import threading
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from rounds import QUIET, interleaved, print_throughputs, spread

WAYS = ("RayStrategy", "ddp")
MODELS = ("mlp", "transformer")
FEATURES = 16_000  # of one square float32 layer: 1 GB
LATER_CALLS = 3
SAMPLE_SECONDS = 0.005


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each (default 60)")
    parser.add_argument("--child", nargs="+", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, *given = arguments.child
        child(way, given)
        return
    for model in MODELS:
        found = interleaved(__file__, WAYS, arguments.rounds, model, str(arguments.steps))
        print_throughputs(f"{model}, two processes", found, WAYS[0])
    (calls,) = interleaved(__file__, ["return"], 1)["return"]
    print("\n1 GB of weights, RayStrategy, warm calls")
    for name, unit in (("call", "s"), ("return", "s"), ("peak", "GB beside the model")):
        print(f"  {name:8}{spread([call[name] for call in calls])} {unit}")


def child(way: str, given: list[str]) -> None:
    """Print what one process measures."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as directory:
        os.environ["RAY_TMPDIR"] = directory
        if way == "return":
            calls = [bring_home(Path(directory, "ended")) for _ in range(1 + LATER_CALLS)]
            print(json.dumps(calls[1:]))
        else:
            seconds = steps(way, given[0], int(given[1]))
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(json.dumps(seconds))


def steps(way: str, model: str, count: int) -> float:
    """Seconds of a step."""
    import lightning.pytorch as pl
    import torch
    from models.clocks import Timer
    from models.steps import Lit, loader

    torch.set_num_threads(1)
    timer = Timer()
    if way == "RayStrategy":
        from lightning_mgpu.ray import RayStrategy

        strategy: Any = RayStrategy(num_workers=2, num_cpus_per_worker=1)
        devices: Any = "auto"
    else:
        strategy, devices = "ddp", 2
    trainer = pl.Trainer(
        devices=devices, strategy=strategy, max_epochs=1, callbacks=[timer], **QUIET
    )
    lit = Lit(model)
    trainer.fit(lit, loader(lit.shape, 2 * count))
    cut = max(1, count // 10)
    return median(timer.seconds[cut:-cut])


def bring_home(ended: Path) -> dict[str, float]:
    """One `fit`: seconds of the call and of the way back, and the driver's memory."""
    import lightning.pytorch as pl
    import torch
    from models.clocks import Ended
    from models.one_layer import OneLayer
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_mgpu.ray import RayStrategy

    model = OneLayer(FEATURES)
    trainer = pl.Trainer(
        strategy=RayStrategy(num_workers=2, num_cpus_per_worker=0.5),
        max_steps=1,
        callbacks=[Ended(ended)],
        **QUIET,
    )
    data = DataLoader(TensorDataset(torch.ones(4, FEATURES)))
    before = own_memory()
    with Peak() as peak:
        started = time.time()
        trainer.fit(model, data)
        done = time.time()
    return {
        "call": done - started,
        "return": done - float(ended.read_text()),
        "peak": (peak.bytes - before) / 1e9,
    }


def own_memory() -> int:
    """Bytes of this process that are not files or shared: Ray's store, for one, does not count."""
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


class Peak:
    """The most memory of its own that this process has while the block lasts."""

    def __enter__(self) -> "Peak":
        self.bytes = own_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, own_memory())


if __name__ == "__main__":
    main()
