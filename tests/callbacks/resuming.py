"""A model, data and callbacks that draw and log in every way, for tests of resuming."""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_mgpu.callbacks import ExactResume

Sample = tuple[Tensor, int]


class Augmented(Dataset[Sample]):
    """22 samples, with noise from each of the generators that programs use."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Sample:
        x = torch.full((6,), index / 22, dtype=torch.float64)
        noise = torch.randn(6, dtype=torch.float64) + random.random() + float(np.random.rand())
        return x + 0.1 * noise, index % 3


class Endless(IterableDataset[Sample]):
    """The same without a length."""

    def __iter__(self) -> Iterator[Sample]:
        return (Augmented()[index] for index in torch.randperm(22).tolist())


class Net(pl.LightningModule):
    """Draws in steps and hooks, and logs sums, extremes and metrics.

    Args:
        manual: Whether it steps by itself, every other batch.
        plateau: Whether its scheduler monitors what validation logs.
        draws: Whether it draws when an epoch starts.
    """

    def __init__(self, manual: bool = False, plateau: bool = False, draws: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.plateau, self.draws = plateau, draws
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 8, dtype=torch.float64),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(8, 3, dtype=torch.float64),
        )
        self.seen, self.validated = MeanMetric(), MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self._loss(batch["a"]) + self._loss(batch["b"])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_start(self) -> None:
        if self.draws:
            torch.rand(())

    def on_train_epoch_start(self) -> None:
        if self.draws:
            torch.rand(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.seen(loss.detach())
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.log("largest", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2 == 1:
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self._loss(batch)
        self.log("val_loss", loss)
        self.validated(loss)
        self.log("validated", self.validated)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        if self.plateau:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, threshold=0.5
            )
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Saver(pl.callbacks.Checkpoint):
    """Writes a checkpoint at every opportunity, and notes what each epoch has logged.

    Args:
        directory: Where to; `None` to write none.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.saved: list[Path] = []
        self.epochs: list[dict[str, float]] = []

    def _save(self, trainer: pl.Trainer, where: str) -> None:
        if self.directory is not None and not trainer.sanity_checking:
            path = self.directory / f"{len(self.saved):03}-{where}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append(path)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "start")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.epochs.append({k: float(v) for k, v in sorted(trainer.callback_metrics.items())})
        self._save(trainer, "epoch")


class Result:
    """What a run ends with.

    Attributes:
        digest: Of all weights and the optimizer's state.
        rates: The learning rates.
        steps: How many optimizer steps it has made.
        epochs: What each epoch has logged.
    """

    def __init__(self, trainer: pl.Trainer, model: pl.LightningModule, saver: Saver) -> None:
        tensors = [*model.state_dict().values(), *_tensors(trainer.optimizers[0].state_dict())]
        self.digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.epochs, self.steps = saver.epochs, trainer.global_step

    def assert_continues(self, whole: "Result", name: str) -> None:
        """It has ended as `whole`, of which it has repeated the last epochs."""
        assert self.digest == whole.digest, name
        assert self.steps == whole.steps, name
        assert self.epochs == whole.epochs[len(whole.epochs) - len(self.epochs) :], name
        # (After the last epoch there is nothing left to do, and nothing is done.)
        assert self.rates == whole.rates or not self.epochs, name


def loader(**kwargs: Any) -> DataLoader[Sample]:
    return DataLoader(Augmented(), **{"batch_size": 4, "shuffle": True, **kwargs})


def fit(
    loaders: Callable[[], Any],
    saver: Saver,
    checkpoint: Path | None = None,
    exact: bool = True,
    model: pl.LightningModule | dict[str, Any] | None = None,
    validation: bool = True,
    others: Callable[[], list[pl.Callback]] = list,
    **kwargs: Any,
) -> Result:
    """Train from the same seeds."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    net = model if isinstance(model, pl.LightningModule) else Net(**(model or {}))
    callbacks = [*others(), saver, *([ExactResume()] if exact else [])]
    options = {"strategy": "auto", "devices": 1, "max_epochs": 3, **kwargs}
    trainer = boring.trainer(callbacks=callbacks, enable_checkpointing=True, **options)
    val = DataLoader(Augmented(), batch_size=11) if validation else None
    trainer.fit(net, loaders(), val, ckpt_path=checkpoint)
    return Result(trainer, net, saver)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in _tensors(part)]
