"""Three clouds of points."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Blobs(LightningDataModule):
    def __init__(self, batch_size: int, samples: int) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(self.hparams.samples) % 3
        points = torch.randn(len(labels), 2, generator=generator) + 3 * labels.unsqueeze(1)
        self.dataset = TensorDataset(points, labels)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.hparams.batch_size)

    test_dataloader = val_dataloader
