"""A LeNet-style convolutional network."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lightning_mgpu.demo.classifier import Classifier, image_size


class LeNet(Classifier):
    """Two convolutions, each with pooling, and three linear layers.

    The hidden sizes `l1` and `l2` are what tuning examples search over. The convolutions keep the
    image's size (padding), so that 8x8 images fit as well as 32x32. Inputs are float images of
    shape (B, *image_shape).

    Args:
        image_shape: (channels, height, width); at least 4x4.
        num_classes: Number of logits.
        l1: Width of the first linear layer.
        l2: Width of the second linear layer.
        channels: Channels after the first and the second convolution.
        dropout: Share of the convolutions' outputs to drop while training.
        lr: Adam's learning rate.

    Raises:
        ValueError: If the image is too small to be pooled twice, or `channels` is not a pair.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        l1: int = 128,
        l2: int = 64,
        channels: Sequence[int] = (32, 64),
        dropout: float = 0.25,
        lr: float = 3e-3,
    ) -> None:
        image_shape, channels = image_size(image_shape), tuple(int(c) for c in channels)
        super().__init__(lenet(image_shape, channels, (l1, l2), dropout, num_classes), lr=lr)
        self.save_hyperparameters()


def lenet(
    image_shape: tuple[int, int, int],
    channels: tuple[int, ...],
    hidden: tuple[int, int],
    dropout: float,
    num_classes: int,
) -> nn.Sequential:
    """Build the network as one flat sequence of named layers."""
    if len(channels) != 2:
        raise ValueError(f"`channels` must be a pair, one for each convolution, got {channels}")
    depth, height, width = image_shape
    if min(height, width) < 4:
        raise ValueError(f"LeNet halves an image twice: at least 4x4, got {height}x{width}")
    (c1, c2), (l1, l2) = channels, hidden
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(depth, c1, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(c1, c2, kernel_size=3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(dropout),
            fc1=nn.Linear(c2 * (height // 4) * (width // 4), l1),
            relu3=nn.ReLU(),
            fc2=nn.Linear(l1, l2),
            relu4=nn.ReLU(),
            fc3=nn.Linear(l2, num_classes),
        )
    )
