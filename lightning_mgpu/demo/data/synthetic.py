"""Random data of any size that can still be learnt."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from lightning_mgpu.demo.classifier import image_size
from lightning_mgpu.demo.data.splits import SplitDataModule, Splits, split


class Synthetic(SplitDataModule):
    """Images or token sequences around one random prototype per class, made in memory.

    Without `vocab_size`, a sample is its class's prototype plus as much noise: float32 of shape
    `image_shape`. With it, a sample keeps half the tokens of its class's prototype and draws the
    others at random: int64 of shape (sequence_length,). Labels are int64.

    Args:
        size: Number of samples, before they are split.
        num_classes: Number of different labels.
        image_shape: (channels, height, width); unused with `vocab_size`.
        vocab_size: Number of different tokens; None for images.
        sequence_length: Tokens in a sample; unused without `vocab_size`.
        batch_size: Samples in a batch, per process.
        num_workers: Loader processes; 0 loads in the training process.
        val_fraction: Share of the samples to validate on; may be 0.
        test_fraction: Share of the samples to test and predict on; may be 0.
        seed: The same seed gives the same samples and splits.
    """

    def __init__(
        self,
        *,
        size: int = 4096,
        num_classes: int = 10,
        image_shape: Sequence[int] = (3, 32, 32),
        vocab_size: int | None = None,
        sequence_length: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.size = size
        self.num_classes = num_classes
        self.image_shape = image_size(image_shape)
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.fractions = (val_fraction, test_fraction)
        self.seed = seed

    def load(self) -> Splits:
        generator = Generator().manual_seed(self.seed)
        labels = torch.randint(self.num_classes, (self.size,), generator=generator)
        if self.vocab_size is None:
            inputs = self._images(labels, generator)
        else:
            inputs = self._tokens(labels, self.vocab_size, generator)
        return split(TensorDataset(inputs, labels), *self.fractions, self.seed)

    def _images(self, labels: Tensor, generator: Generator) -> Tensor:
        prototypes = torch.randn(self.num_classes, *self.image_shape, generator=generator)
        noise = torch.randn(self.size, *self.image_shape, generator=generator)
        return prototypes[labels] + noise

    def _tokens(self, labels: Tensor, vocab_size: int, generator: Generator) -> Tensor:
        shape = (self.size, self.sequence_length)
        prototypes = torch.randint(
            vocab_size, (self.num_classes, self.sequence_length), generator=generator
        )
        noise = torch.randint(vocab_size, shape, generator=generator)
        keep = torch.rand(shape, generator=generator) < 0.5
        return torch.where(keep, prototypes[labels], noise)
