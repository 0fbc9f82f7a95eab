"""What watching for hangs and for drifting ranks costs: a step of two CPU processes, interleaved.

With and without the watch, which asks nothing while steps of some milliseconds go on, and with
`detect_divergence` at every step and at every 100th.
"""

import argparse
import json
from typing import Any
from unittest.mock import patch

from rounds import QUIET, interleaved, spread

WAYS = ["without", "watched", "watched often", "compared each step", "compared each 100"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each (default 400)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.steps)))
        return
    found = interleaved(__file__, WAYS, arguments.rounds, "--steps", str(arguments.steps))
    print("ms a step, and of one without")
    for way in WAYS:
        ratios = [own / other for own, other in zip(found[way], found["without"], strict=True)]
        print(f"  {way:20}{spread(found[way])}   {spread(ratios)}")


def measure(way: str, steps: int) -> float:
    """Milliseconds of a step, the median."""

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from rounds.stamps import Stamps
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_mgpu import DDPStrategy
    from lightning_mgpu.launch.watchdog import Watchdog

    options: dict[str, Any] = {}
    if way == "without":
        patch.object(Watchdog, "tick", lambda *_: None).start()
    elif way == "watched often":
        options["hang_timeout_s"] = 0.8  # a tick each 0.1 s
    elif way.startswith("compared"):
        options["detect_divergence"] = 100 if way.endswith("100") else 1

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    stamps = Stamps()
    trainer = Trainer(
        **QUIET, devices=2, strategy=DDPStrategy(**options), max_steps=steps, callbacks=[stamps]
    )
    data = TensorDataset(torch.randn(64 * 2 * steps, 256))
    trainer.fit(Model(), DataLoader(data, batch_size=64))
    return stamps.milliseconds()


if __name__ == "__main__":
    main()
