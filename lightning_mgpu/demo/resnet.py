"""A small residual network with batch normalisation."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_mgpu.demo.classifier import Classifier, image_size


class ResNet(Classifier):
    """A stem, groups of residual blocks, and a linear layer on the average over the image.

    Each group after the first halves the image and doubles the channels. Inputs are float images of
    shape (B, *image_shape), from 8x8 on with the default three groups.

    Args:
        image_shape: (channels, height, width).
        num_classes: Number of logits.
        width: Channels of the first group.
        blocks: Residual blocks in each group.
        lr: Adam's learning rate.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        lr: float = 2e-3,
    ) -> None:
        image_shape, blocks = image_size(image_shape), tuple(int(count) for count in blocks)
        super().__init__(resnet(image_shape[0], width, blocks, num_classes), lr=lr)
        self.save_hyperparameters()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added back.

    From (B, inputs, H, W) to (B, outputs, H / stride, W / stride). Where that changes the shape, a
    1x1 convolution makes the input fit.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                norm1=nn.BatchNorm2d(outputs),
                relu=nn.ReLU(),
                conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(outputs),
            )
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    norm=nn.BatchNorm2d(outputs),
                )
            )
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.relu(self.body(images) + self.shortcut(images))
        return outputs


def resnet(channels: int, width: int, blocks: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build the network as one flat sequence: stem, `group1` .. `groupN`, pool, flatten, head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, width, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(width),
                relu=nn.ReLU(),
            )
        )
    )
    widths = [width * 2**index for index in range(len(blocks))]
    for index, ((fan_in, fan_out), count) in enumerate(
        zip(pairwise([width, *widths]), blocks, strict=True)
    ):
        first = ResidualBlock(fan_in, fan_out, stride=1 if index == 0 else 2)
        others = (ResidualBlock(fan_out, fan_out) for _ in range(count - 1))
        layers[f"group{index + 1}"] = nn.Sequential(first, *others)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(widths[-1], num_classes)
    return nn.Sequential(layers)
