"""A multilayer perceptron for images."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from lightning_mgpu.demo.classifier import Classifier, image_size


class MLP(Classifier):
    """Fully connected layers with ReLU between them.

    Inputs are float images of shape (B, *image_shape); `net` is one flat `nn.Sequential`.

    Args:
        image_shape: (channels, height, width).
        num_classes: Number of logits.
        hidden: Width of each hidden layer; empty for a linear classifier.
        lr: Adam's learning rate.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        hidden: Sequence[int] = (256, 128),
        lr: float = 2e-3,
    ) -> None:
        image_shape, hidden = image_size(image_shape), tuple(int(width) for width in hidden)
        super().__init__(mlp(prod(image_shape), hidden, num_classes), lr=lr)
        self.save_hyperparameters()


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Build the network: flatten, then (linear, ReLU) per hidden layer, then linear."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((inputs, *hidden)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    layers.append(nn.Linear((inputs, *hidden)[-1], outputs))
    return nn.Sequential(*layers)
