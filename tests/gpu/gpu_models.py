"""Models whose layers have something to do with the device that they are on."""

from typing import Any

import boring
import parity_models
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


class Images(parity_models.Model):
    """Convolutions and batch normalisation, of images of 3 x 8 x 8."""

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 3)),
        )


class FrozenStatistics(Images):
    """Which normalises alike whatever the batch is split into."""

    def build(self) -> nn.Module:
        net = super().build()
        net[0][1].eval()
        return net


def images(
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format = torch.contiguous_format,
    pinned: bool = False,
) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(48, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(48) % 3

    def collated(samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        first, second = zip(*samples, strict=True)
        return [torch.stack(first).contiguous(memory_format=layout), torch.stack(second)]

    return DataLoader(TensorDataset(x, y), 12, collate_fn=collated, pin_memory=pinned)


class Dropout(parity_models.Model):
    """Two layers that draw random numbers, in parts that can be computed again in backward."""

    again = False
    rate = 0.5

    class Part(nn.Module):
        def __init__(self, rate: float, again: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 6), nn.Dropout(rate), nn.Tanh())
            self.again = again

        def forward(self, x: Tensor) -> Tensor:
            if self.again:
                return checkpoint(self.layers, x, use_reentrant=False)
            return self.layers(x)

    def build(self) -> nn.Module:
        parts = [self.Part(self.rate, self.again) for _ in range(3)]
        return nn.Sequential(*parts, nn.Linear(6, 3))


class DropoutAgain(Dropout):
    """The same, with activation checkpointing of the user's own."""

    again = True


class Attention(parity_models.Model):
    """Attention that drops out, for which there are kernels that take no generator."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2, 16)
            self.layers = nn.Sequential(
                *(nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True) for _ in range(2))
            )
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(self.embed(x.unflatten(1, (3, 2)))).mean(1))

    build = Net


class SinglePrecision(boring.Classifier):
    """Three linear layers, `float32`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                *(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].to(self.dtype), batch[1]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([batch[0].to(self.dtype), batch[1]], batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step([batch[0].to(self.dtype), batch[1]], batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0].to(self.dtype))
