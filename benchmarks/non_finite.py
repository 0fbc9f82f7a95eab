"""What `NonFiniteGuard` costs a step; with and without it, interleaved.

Steps are those of a small MLP on one CPU, and of one with batch normalisation, whose buffers are
copied for each step.
"""

import argparse
import json

from rounds import QUIET, interleaved, spread

MODELS = ("linear", "normalised")
ACTIONS = ("without", "stop", "rollback")
WAYS = [f"{model}, {action}" for model in MODELS for action in ACTIONS]


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
    print("ms a step")
    for way in WAYS:
        print(f"  {way:20}{spread(found[way])}")
    print("a step with it, of one without")
    for model in MODELS:
        for action in ACTIONS[1:]:
            way = f"{model}, {action}"
            pairs = zip(found[way], found[f"{model}, without"], strict=True)
            print(f"  {way:20}{spread([a / b for a, b in pairs])}")


def measure(way: str) -> float:
    """Milliseconds of a step."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from rounds.stamps import Stamps
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_mgpu.callbacks import NonFiniteGuard

    torch.set_num_threads(1)
    name, action = way.split(", ")

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers = []
            for _ in range(8):
                layers.append(nn.Linear(256, 256))
                if name == "normalised":
                    layers.append(nn.BatchNorm1d(256))
            self.net = nn.Sequential(*layers)

        def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
            (x,) = batch
            return self.net(x).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    stamps = Stamps()
    guards = [] if action == "without" else [NonFiniteGuard(action, bundle=False)]
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[*guards, stamps])
    trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(64 * 400, 256)), batch_size=64))
    return stamps.milliseconds()


if __name__ == "__main__":
    main()
