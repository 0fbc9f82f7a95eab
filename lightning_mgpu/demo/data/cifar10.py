"""CIFAR-10, by way of torchvision."""

from pathlib import Path
from typing import Any

from lightning_mgpu.demo.data.splits import SplitDataModule, Splits, require, split


class CIFAR10(SplitDataModule):
    """60000 colour images of ten kinds of things; 10000 of them are the test split.

    Images are float32 of shape (3, 32, 32) with values from 0 to 1, labels int64.

    Args:
        data_dir: Where the files are or go; `~` works.
        download: Fetch the files (170 MB) if they are not there.
        batch_size: Samples in a batch, per process.
        num_workers: Loader processes; 0 loads in the training process.
        val_fraction: Share of the 50000 training images to validate on.
        split_seed: Which samples go where; independent of the run's seed, so that runs compare.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """

    def __init__(
        self,
        *,
        data_dir: str | Path = "~/.cache/lightning_mgpu",
        download: bool = True,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        require("torchvision", "CIFAR10", "torchvision")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def prepare_data(self) -> None:
        # Only one process per machine comes here, so the downloads do not race.
        for train in (True, False) if self.download else ():
            self._open(train=train, download=True)

    def load(self) -> Splits:
        train, val, _ = split(self._open(train=True), self.val_fraction, 0, self.split_seed)
        return Splits(train, val, self._open(train=False))

    def _open(self, *, train: bool, download: bool = False) -> Any:
        from torchvision import datasets, transforms

        return datasets.CIFAR10(
            self.data_dir, train=train, download=download, transform=transforms.ToTensor()
        )
