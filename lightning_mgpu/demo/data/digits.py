"""Handwritten digits that ship with the package."""

import gzip
from importlib.resources import files

import torch
from torch.utils.data import TensorDataset

from lightning_mgpu.demo.data.splits import SplitDataModule, Splits, split

_IMAGE = (1, 8, 8)
_PIXELS = 64
_INK = 16  # the largest value of a pixel


class Digits(SplitDataModule):
    """1797 grey images of the digits 0 to 9; nothing is downloaded.

    Images are float32 of shape (1, 8, 8) with values from 0 to 1, labels int64.

    Args:
        batch_size: Samples in a batch, per process.
        num_workers: Loader processes; 0 loads in the training process.
        val_fraction: Share of the samples to validate on.
        test_fraction: Share of the samples to test and predict on.
        split_seed: Which samples go where; independent of the run's seed, so that runs compare.
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
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed

    def load(self) -> Splits:
        return split(read_digits(), *self.fractions, self.split_seed)


def read_digits() -> TensorDataset:
    """Read all images and labels, in the order of the original.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits" (1998), UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; the test set. These are also
    the samples of scikit-learn's `load_digits`.

    Returns:
        Images of shape (1, 8, 8) with values from 0 to 1, float32, and labels, int64.
    """
    packed = files(__package__).joinpath("optdigits.gz").read_bytes()
    rows = torch.frombuffer(bytearray(gzip.decompress(packed)), dtype=torch.uint8)
    rows = rows.view(-1, _PIXELS + 1)
    images = rows[:, :_PIXELS].reshape(-1, *_IMAGE).to(torch.float32) / _INK
    return TensorDataset(images, rows[:, _PIXELS].to(torch.int64))
