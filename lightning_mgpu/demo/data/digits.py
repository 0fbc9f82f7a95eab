"""Scikit-learn's handwritten digits."""

import torch
from torch.utils.data import TensorDataset

from lightning_mgpu.demo.data.splits import SplitDataModule, Splits, require, split


class Digits(SplitDataModule):
    """1797 grey images of the digits 0 to 9, which come with scikit-learn: nothing is downloaded.

    Images are float32 of shape (1, 8, 8) with values from 0 to 1, labels int64.

    Args:
        batch_size: Samples in a batch, per process.
        num_workers: Loader processes; 0 loads in the training process.
        val_fraction: Share of the samples to validate on.
        test_fraction: Share of the samples to test and predict on.
        split_seed: Which samples go where; independent of the run's seed, so that runs compare.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        require("sklearn", "Digits", "'lightning_mgpu[demo]'")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed

    def load(self) -> Splits:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.as_tensor(digits.target, dtype=torch.int64)
        return split(TensorDataset(images, labels), *self.fractions, self.split_seed)
