"""Base class of the demo models: loss, logging and optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam


class Classifier(LightningModule):
    """Cross-entropy and accuracy around one network, `self.net`.

    A batch is `(inputs, labels)`: inputs of shape (B, ...) as the network wants them, labels int64
    of shape (B,). Logs `train_loss` at each step, and `val_loss`, `val_acc`, `test_loss`,
    `test_acc` once per epoch, averaged over all samples of all processes.

    Subclasses build the network and call `save_hyperparameters()`.

    Args:
        net: From inputs to logits, float of shape (B, classes).
        lr: Adam's learning rate.
    """

    def __init__(self, net: nn.Module, *, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, float of shape (B, classes)."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the classes' probabilities, float of shape (B, classes); labels are optional."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return torch.softmax(self(inputs), dim=1)

    def configure_optimizers(self) -> Adam:
        return Adam(self.parameters(), lr=self.lr)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self(inputs)
        metrics = {
            f"{stage}_loss": F.cross_entropy(logits, labels),
            f"{stage}_acc": (logits.argmax(dim=1) == labels).float().mean(),
        }
        self.log_dict(metrics, prog_bar=True, sync_dist=True, batch_size=len(labels))


def image_size(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (channels, height, width) as plain integers.

    Raises:
        ValueError: If there are not exactly three positive numbers.
    """
    sizes = tuple(int(size) for size in image_shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(
            f"`image_shape` must be three positive sizes (channels, height, width), got {sizes}"
        )
    return sizes[0], sizes[1], sizes[2]
