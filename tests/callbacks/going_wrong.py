"""Modules and models that go NaN or Inf in one way each, for tests of `NonFiniteGuard`."""

from typing import Any

import boring
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_mgpu.callbacks import NonFiniteGuard

MARK = 100.0
"""The first feature of samples that go wrong."""


def _marked(x: Tensor) -> Tensor:
    return (x.amax(1, keepdim=True) > MARK / 2).to(x.dtype)


class LogOfZero(nn.Module):
    """-Inf, then NaN, in forward, for marked samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.log(1 - _marked(x))


class RootOfZero(nn.Module):
    """Finite in forward; Inf, then NaN, in backward for marked samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sqrt((x - x) ** 2 + 1 - _marked(x)) - 1


class RareNoise(nn.Module):
    """NaN for marked samples, where a random number says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.rand(len(x), 1) > 0.5 * _marked(x)).to(x.dtype) * 1.0


class Once(nn.Module):
    """NaN the first time only."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Once.calls += 1
        return x * (float("nan") if Once.calls == 1 else 1.0)


class Net(pl.LightningModule):
    """Marked samples pass through `bad`, the input layer unchanged.

    Args:
        bad: What goes wrong.
        term: Whether the loss has a term that goes wrong.
        manual: Whether it steps by itself.
    """

    def __init__(self, bad: nn.Module, term: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.term = term
        torch.manual_seed(0)
        double: Any = {"dtype": torch.float64}
        self.net = nn.Sequential(
            nn.Identity(),
            bad,
            nn.Linear(6, 8, **double),
            nn.BatchNorm1d(8, **double),
            nn.Dropout(0.2),
            nn.Linear(8, 3, **double),
        )
        self.first = nn.Parameter(torch.ones(6, **double))
        self.seen = MeanMetric()
        self.steps, self.sizes = 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.first)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.steps += 1
        self.sizes.append(len(x))
        error = nn.functional.cross_entropy(self(x), y)
        penalty = torch.log(1 - _marked(x)).mean() if self.term else error.new_zeros(())
        self.seen(error.detach())
        self.log("error", error)
        self.log("penalty", penalty)
        loss = error + penalty
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def loader(*marked: int, size: int = 48, batch: int = 8) -> DataLoader[Any]:
    """Samples of three classes, of which those with these numbers are marked."""
    x, y = boring.blobs(size).tensors
    x = x.clone()
    x[list(marked), 0] = MARK
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def fit(model: pl.LightningModule, data: Any, guard: Any = None, **kwargs: Any) -> pl.Trainer:
    """Train from the same seed."""
    torch.manual_seed(3)
    options: dict[str, Any] = {"strategy": "auto", "devices": 1, **kwargs}
    guards = [] if guard is None else [guard]
    trainer = boring.trainer(callbacks=[*options.pop("others", []), *guards], **options)
    trainer.fit(model, data)
    return trainer


def guard(directory: Any, action: Any = "stop", **kwargs: Any) -> NonFiniteGuard:
    return NonFiniteGuard(action, dirpath=directory, **kwargs)
