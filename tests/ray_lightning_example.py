"""The example of ray_lightning's README, for Lightning 2, with its imports changed to ours.

Images are our digits in place of MNIST, which would have to be downloaded.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from ray import tune
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu.demo.data.digits import read_digits
from lightning_mgpu.ray import RayStrategy
from lightning_mgpu.ray.tune import TuneReportCallback, get_tune_resources

SPACE = {
    "layer_1": tune.choice([32, 64]),
    "layer_2": tune.choice([32, 64]),
    "lr": tune.loguniform(1e-3, 1e-2),
    "batch_size": tune.choice([32]),
}


class MNISTClassifier(pl.LightningModule):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.lr, self.batch_size = config["lr"], config["batch_size"]
        sizes = [64, config["layer_1"], config["layer_2"], 10]
        self.layers = torch.nn.ModuleList(map(torch.nn.Linear, sizes[:-1], sizes[1:]))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return torch.log_softmax(self.layers[-1](x), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        logits = self(x)
        loss = functional.nll_loss(logits, y)
        self.log("ptl/train_loss", loss)
        self.log("ptl/train_accuracy", self.accuracy(logits, y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("ptl/val_loss", functional.nll_loss(logits, y), sync_dist=True)
        self.log("ptl/val_accuracy", (logits.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = read_digits().tensors
        data = TensorDataset(images.flatten(1), labels)
        return DataLoader(data, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def train(config: dict[str, Any]) -> pl.Trainer:
    ptl_model = MNISTClassifier(config)
    strategy = RayStrategy(num_workers=2, num_cpus_per_worker=1, use_gpu=False)
    trainer = pl.Trainer(max_epochs=4, strategy=strategy)
    trainer.fit(ptl_model)
    return trainer


def train_mnist(config: dict[str, Any]) -> None:
    model = MNISTClassifier(config)
    metrics = {"loss": "ptl/val_loss", "acc": "ptl/val_accuracy"}
    callbacks = [TuneReportCallback(metrics, on="validation_end")]
    trainer = pl.Trainer(
        max_epochs=4, callbacks=callbacks, strategy=RayStrategy(num_workers=2, use_gpu=False)
    )
    trainer.fit(model)


def tune_mnist(num_samples: int, storage_path: str) -> Any:
    return tune.run(
        train_mnist,
        metric="loss",
        mode="min",
        config=SPACE,
        num_samples=num_samples,
        resources_per_trial=get_tune_resources(num_workers=2),
        name="tune_mnist",
        storage_path=storage_path,
    )
