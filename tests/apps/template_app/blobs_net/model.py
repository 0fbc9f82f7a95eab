"""A small classifier; its network and optimizer come ready-made."""

from collections.abc import Callable

import torch
from lightning import LightningModule
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class Net(torch.nn.Sequential):
    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__(
            torch.nn.Linear(features, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes)
        )


class BlobsModule(LightningModule):
    def __init__(self, net: torch.nn.Module, optimizer: Callable, scheduler: Callable | None):
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = torch.nn.CrossEntropyLoss()
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc = MulticlassAccuracy(3)
        self.val_acc_best = MaxMetric()

    def on_train_start(self) -> None:
        # The sanity check is over: forget what it has counted.
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.train_loss(loss)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx) -> None:
        logits = self.net(batch[0])
        self.val_loss(self.criterion(logits, batch[1]))
        self.val_acc(logits, batch[1])
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = {
            "scheduler": self.hparams.scheduler(optimizer=optimizer),
            "monitor": "val/loss",
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
