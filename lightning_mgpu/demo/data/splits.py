"""Base class of the demo data modules: three splits and their loaders."""

from abc import ABC, abstractmethod
from collections.abc import Sized
from importlib.util import find_spec
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch import Generator
from torch.utils.data import DataLoader, Dataset, random_split


class Splits(NamedTuple):
    """Datasets of (input, label) pairs."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


class SplitDataModule(LightningDataModule, ABC):
    """Loads three splits once and serves them; subclasses say what they are.

    Training batches are shuffled; the others, and predictions (on the test split), keep the order.

    Args:
        batch_size: Samples in a batch, per process.
        num_workers: Loader processes; 0 loads in the training process.
    """

    def __init__(self, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Return the splits, the same ones in every process."""

    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            self._splits = self.load()

    @property
    def splits(self) -> Splits:
        """The datasets; loads them if `setup` has not."""
        self.setup()
        assert self._splits is not None
        return self._splits

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits.test)

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        assert isinstance(dataset, Sized)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            # A sampler that shuffles refuses an empty split.
            shuffle=shuffle and len(dataset) > 0,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def split(dataset: Dataset[Any], val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Split the samples at random, always in the same way for the same seed.

    Raises:
        ValueError: If a fraction is negative, or nothing is left to train on.
    """
    assert isinstance(dataset, Sized)
    total = len(dataset)
    val, test = int(total * val_fraction), int(total * test_fraction)
    if val_fraction < 0 or test_fraction < 0 or val + test >= total:
        raise ValueError(
            f"`val_fraction` and `test_fraction` must leave some of {total} samples to train on "
            f"(val_fraction: {val_fraction}, test_fraction: {test_fraction})"
        )
    sizes = (total - val - test, val, test)
    return Splits(*random_split(dataset, sizes, Generator().manual_seed(seed)))


def require(module: str, purpose: str, install: str) -> None:
    """Check that a package is installed, without importing it.

    Raises:
        ModuleNotFoundError: If it is not, saying how to install it.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(f"{purpose} needs {module}: pip install {install}", name=module)
