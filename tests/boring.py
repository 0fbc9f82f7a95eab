"""A small model and its data, for tests of strategies: float64 and deterministic."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def blobs(size: int = 48, features: int = 6, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """`size` samples of three classes that can be told apart; x: (size, features), y: (size,)."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(size) % 3
    centres = torch.randn(3, features, generator=generator, dtype=torch.float64) * 3
    x = centres[y] + torch.randn(size, features, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), y)


class Classifier(pl.LightningModule):
    """Logs in every way, so that parity tests see every metric."""

    def __init__(self, optimizer: str = "sgd", scheduler: bool = False, features: int = 6) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(features, 8, dtype=torch.float64),
            torch.nn.Tanh(),
            torch.nn.Linear(8, 3, dtype=torch.float64),
        )
        torch.set_rng_state(generator_state)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)
        accuracy = (self(batch[0]).argmax(1) == batch[1]).double().mean()
        self.log("val_acc", accuracy, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        kinds = {
            "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9),
            "adam": lambda: torch.optim.Adam(self.parameters(), lr=0.02),
        }
        optimizer = kinds[self.optimizer]()
        if not self.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Blobs(pl.LightningDataModule):
    """`blobs`, the same for every stage.

    With `world_size` the ranks' batches together are those of one process with a batch that many
    times larger, in the same order; give the Trainer `use_distributed_sampler=False`. (Left to
    itself Lightning shuffles under DDP.)
    """

    def __init__(self, batch_size: int = 4, size: int = 48, world_size: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.size = size
        self.world_size = world_size

    def _dataloader(self) -> DataLoader[Any]:
        dataset = blobs(self.size)
        sampler: Any = None
        if self.world_size:
            rank = self.trainer.global_rank
            sampler = DistributedSampler(dataset, self.world_size, rank, shuffle=False)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _dataloader


def trainer(strategy: Any = "mgpu_ddp", devices: Any = 2, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(devices=devices, strategy=strategy, **{**quiet, **kwargs})


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-9) -> None:
    """Both state dicts hold the same tensors, to `tolerance`."""
    theirs = b.state_dict()
    assert theirs.keys() == a.state_dict().keys()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=tolerance, msg=name)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package has warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("lightning_mgpu")
    ]
