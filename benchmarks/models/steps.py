"""The models of `strategies.py`, in a module that the processes of `ddp` can import."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WIDTH = 1024


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """8 blocks of Linear(1024), GELU and LayerNorm; batches of 512."""
    blocks = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(8)
    )
    return nn.Sequential(*blocks), (512, WIDTH)


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    """4 convolutions with batch normalisation; batches of 64 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 64), (64, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*layers, *head), (64, 3, 32, 32)


def transformer() -> tuple[nn.Module, tuple[int, ...]]:
    """4 encoder layers of width 256 without dropout; batches of 32 sequences of 64."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4), (32, 64, 256)


MODELS = {"mlp": mlp, "conv": conv, "transformer": transformer}


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """A loss with a gradient for every output."""
    loss: Tensor = net(x).square().mean()
    return loss


class Lit(pl.LightningModule):
    """One of the models, trained by plain SGD."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.shape = MODELS[name]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Batches(Dataset[Tensor]):
    """The same batch again and again, ready made: what is measured is the step."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        self.batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


def loader(shape: tuple[int, ...], size: int) -> "DataLoader[Any]":
    """`size` batches of one shape."""
    return DataLoader(Batches(shape, size), batch_size=None)
