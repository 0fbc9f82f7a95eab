"""Small models and Trainers of the namespace that the process uses."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu._compat.lightning import (
    Callback,
    LightningModule,
    Trainer,
)


class Model(LightningModule):
    def __init__(self, size: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(size, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).mean()
        self.log("loss", loss)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)

    predict_dataloader = train_dataloader


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).mean())

    val_dataloader = Model.train_dataloader


class Calls(Callback):
    """Calls functions from within hooks."""

    def __init__(self, **functions: Callable[[Trainer], Any]) -> None:
        for name, function in functions.items():
            setattr(self, name, lambda trainer, *_, function=function, **__: function(trainer))


def quiet(*callbacks: Callback, **kwargs: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **kwargs,
        }
    )
