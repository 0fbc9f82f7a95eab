"""Ranks killed at random moments: does the run end with the same bits, and how long does it pause?

A killer sends SIGKILL to a random worker process of `DDPStrategy(max_failures=...)`, or of
`PipelineDDPStrategy`, some random time after training has begun or gone on. The run has to end with
the weights and optimizer state of one that lost nobody.
"""

import argparse
import hashlib
import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from rounds import QUIET, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu import DDPStrategy, PipelineDDPStrategy
from lightning_mgpu.launch.pool import default_pool

SAMPLES, BATCH, RANKS, STAGES = 512, 8, 2, 2
EVERY_N_STEPS = 10
STRATEGIES = {
    "mgpu_ddp": (DDPStrategy, {}, RANKS),
    "pipeline_ddp": (PipelineDDPStrategy, {"stages": STAGES, "chunks": 2}, RANKS * STAGES),
}


def main() -> None:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each strategy (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="for the moments (default 0)")
    arguments = parser.parse_args()
    epochs = 10 + 5 * arguments.kills
    for name in STRATEGIES:
        ways = {
            snapshots: train(name, epochs, Killer(0, 0), snapshots) for snapshots in (True, False)
        }
        killer = Killer(arguments.kills, arguments.seed)
        is_same = train(name, epochs, killer)[0] == ways[True][0] == ways[False][0]
        print(f"{name}, {len(killer.pauses)} kills: {'the same' if is_same else 'OTHER'} bits")
        if killer.pauses:
            print(f"  seconds until training went on: {spread(killer.pauses)}")
        with_them, without = (1e3 * seconds for _, seconds in ways.values())
        print(
            f"  ms a step with a snapshot every {EVERY_N_STEPS} steps: {with_them:.2f},"
            f" without: {without:.2f}",
            flush=True,
        )


class Net(pl.LightningModule):
    """Dropout and shuffled samples, so that every random state counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(4))
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.net(x) - x).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        data = TensorDataset(torch.randn(SAMPLES, 64, generator=torch.Generator().manual_seed(1)))
        return DataLoader(data, batch_size=BATCH, shuffle=True)


class Killer(pl.Callback):
    """Kills a random worker some time after each beginning, until it has done so often enough.

    Args:
        kills: How often.
        seed: For whom and when.
    """

    def __init__(self, kills: int, seed: int) -> None:
        self._left, self._random = kills, random.Random(seed)
        self._killed_at: float | None = None
        self._is_armed = False
        self.pauses: list[float] = []
        self.began = self.ended = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return vars(Killer(0, 0))  # of other ranks

    def on_train_end(self, *_: Any) -> None:
        self.ended = time.monotonic()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.began = self.began or time.monotonic()
        if self._killed_at is not None and not self._is_armed:
            self.pauses.append(time.monotonic() - self._killed_at)
            self._killed_at = None
        if self._left and not self._is_armed:
            self._is_armed = True
            delay = self._random.uniform(0.01, 0.5)
            threading.Timer(delay, self._kill).start()

    def on_exception(self, *_: Any) -> None:
        self._is_armed = False

    def _kill(self) -> None:
        victim = self._random.choice(default_pool().pids)
        self._left -= 1
        self._killed_at = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def train(name: str, epochs: int, killer: Killer, snapshots: bool = True) -> tuple[str, float]:
    """A digest of what training ends with, and the seconds of a step."""
    kind, options, devices = STRATEGIES[name]
    if snapshots:
        options = {**options, "max_failures": 10**6, "snapshot_every_n_steps": EVERY_N_STEPS}
    torch.manual_seed(3)
    model = Net()
    trainer = pl.Trainer(
        devices=devices, strategy=kind(**options), max_epochs=epochs, callbacks=[killer], **QUIET
    )
    trainer.fit(model)
    found = hashlib.sha256()
    state = [t for of in trainer.optimizers[0].state.values() for t in of.values()]
    for tensor in [*model.state_dict().values(), *state]:
        found.update(torch.as_tensor(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest(), (killer.ended - killer.began) / trainer.global_step


if __name__ == "__main__":
    main()
