"""What `ExactResume` costs: a step, a checkpoint, and its size; with and without it, interleaved.

Steps are those of a small MLP on one CPU, with a loader in the process and one without a length,
which is the dearest: Lightning fetches a batch ahead.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from rounds import QUIET, interleaved, spread

WAYS = [f"{loader}, {way}" for loader in ("length", "no length") for way in ("without", "with")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    found = interleaved(__file__, WAYS, arguments.rounds)
    for index, what in enumerate(("ms a step", "ms a checkpoint", "kB of it")):
        print(what)
        for way in WAYS:
            print(f"  {way:20}{spread([values[index] for values in found[way]])}")
    for loader in ("length", "no length"):
        pairs = zip(found[f"{loader}, with"], found[f"{loader}, without"], strict=True)
        print(
            f"a step with it, of one without: {loader:10}{spread([a[0] / b[0] for a, b in pairs])}"
        )


def measure(way: str) -> tuple[float, float, float]:
    """Milliseconds of a step and of a checkpoint, and its size in kB."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from rounds.stamps import Stamps
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset

    from lightning_mgpu.callbacks import ExactResume

    torch.set_num_threads(1)
    samples = torch.randn(64 * 400, 256)

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(256, 256) for _ in range(8)]
            self.net = torch.nn.Sequential(*layers)

        def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
            (x,) = batch
            loss = self.net(x).square().mean()
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Endless(IterableDataset):
        def __iter__(self):
            return ((sample,) for sample in samples)

    stamps = Stamps()
    data = TensorDataset(samples) if way.startswith("length") else Endless()
    callbacks = [stamps, *([ExactResume()] if way.endswith("with") else [])]
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=callbacks)
    trainer.fit(Model(), DataLoader(data, batch_size=64))
    with tempfile.TemporaryDirectory() as directory:
        path, saved = Path(directory, "x.ckpt"), []
        for _ in range(9):
            started = time.perf_counter()
            trainer.save_checkpoint(path)
            saved.append(time.perf_counter() - started)
        return stamps.milliseconds(), 1e3 * median(saved), os.path.getsize(path) / 1e3


if __name__ == "__main__":
    main()
