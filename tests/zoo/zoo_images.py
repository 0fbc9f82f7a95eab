"""Vision models: timm, torchvision and segmentation_models_pytorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from zoo import BATCH, STEPS, Case, Model

CLASSES = 3


class Classifier(Model):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def outputs(self, batch: Any) -> Any:
        return self.net(batch[0])


class Features(Classifier):
    """A backbone that returns a list of feature maps, and a loss of all of them."""

    def loss(self, batch: Any) -> Tensor:
        return torch.stack([level.square().mean() for level in self.net(batch[0])]).sum()


class Segments(Classifier):
    """torchvision's segmentation models return a dict."""

    def loss(self, batch: Any) -> Tensor:
        found = self.net(batch[0])
        main, auxiliary = (F.cross_entropy(found[head], batch[1]) for head in ("out", "aux"))
        return main + 0.5 * auxiliary


class Dice(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return smp.losses.DiceLoss("multiclass")(self.net(batch[0]), batch[1])


class Detects(Model):
    """Losses in training; in evaluation, boxes for each image."""

    def loss(self, batch: Any) -> Tensor:
        images, targets = batch
        if self.net.training:
            return torch.stack(list(self.net(images, targets).values())).sum()
        return torch.stack([found["scores"].sum() for found in self.net(images)]).mean()

    def outputs(self, batch: Any) -> Any:
        return self.net(batch[0])

    def weight(self, batch: Any) -> int:
        return len(batch[0])


def frozen(net: nn.Module) -> nn.Module:
    """With batch normalisation in evaluation, as fine-tuning has it."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def _images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(BATCH * STEPS, 3, size, size, generator=generator, dtype=torch.float64)


def _labelled(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return [(image, torch.tensor(i % CLASSES)) for i, image in enumerate(_images(size))]


def _masked(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    masks = torch.randint(0, CLASSES, (BATCH * STEPS, size, size), generator=generator)
    return list(zip(_images(size), masks, strict=True))


def _timm(
    name: str, in_training: bool = False, kind: type[Model] = Classifier, **options: Any
) -> Case:
    def build() -> Model:
        net = timm.create_model(name, pretrained=False, **options)
        return kind(net if in_training else frozen(net))

    return Case(build, _labelled())


timm_resnet = partial(_timm, "test_resnet", num_classes=CLASSES)
timm_vit = partial(_timm, "test_vit", num_classes=CLASSES, img_size=32)
timm_convnext = partial(_timm, "test_convnext", num_classes=CLASSES)
timm_features = partial(_timm, "test_efficientnet", kind=Features, features_only=True)
timm_batch_norm = partial(_timm, "test_resnet", in_training=True, num_classes=CLASSES)


class _Narrow(ResNet):
    """torchvision's ResNet with a block in each layer and a quarter of the channels."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(128, CLASSES)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> Any:
        return super()._make_layer(block, planes // 4, *arguments, **options)


def resnet() -> Case:
    return Case(lambda: Classifier(frozen(_Narrow())), _labelled())


def densenet() -> Case:
    """With activations that are computed again in backward."""

    def build() -> Model:
        net = DenseNet(4, (2, 2, 2), 8, num_classes=CLASSES, memory_efficient=True)
        return Classifier(frozen(net))

    return Case(build, _labelled())


def fcn() -> Case:
    """Returns a dict with the output of a second head."""

    def build() -> Model:
        levels = {"layer4": "out", "layer3": "aux"}
        backbone = IntermediateLayerGetter(_Narrow(), levels)
        return Segments(frozen(FCN(backbone, FCNHead(128, CLASSES), FCNHead(64, CLASSES))))

    return Case(build, _masked())


class _Backbone(nn.Module):
    """The detectors' own backbones have millions of parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.convolution = nn.Conv2d(3, channels, 3, stride=8, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": torch.tanh(self.convolution(images))}


def _photographs() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of two sizes, with one to three boxes each."""
    generator = torch.Generator().manual_seed(6)
    samples = []
    for i, image in enumerate(_images(32)):
        count = 1 + i % 3
        corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 12
        sizes = 8 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8
        boxes = torch.cat([corners, corners + sizes], 1)
        labels = torch.randint(1, CLASSES, (count,), generator=generator)
        samples.append((image[:, : 24 + 8 * (i % 2)], {"boxes": boxes, "labels": labels}))
    return samples


def lists(samples: list[Any]) -> tuple[list[Any], ...]:
    """What the detectors want: a list of images and a list of targets."""
    return tuple(list(column) for column in zip(*samples, strict=True))


def _detector(net: Callable[..., nn.Module], channels: int, side: int) -> Case:
    def build() -> Model:
        anchors = AnchorGenerator(((side,),), ((1.0,),))
        options = {"min_size": 32, "max_size": 64, "detections_per_img": 4}
        return Detects(
            net(
                _Backbone(channels),
                CLASSES,
                anchor_generator=anchors,
                topk_candidates=10,
                **options,
            )
        )

    return Case(build, _photographs(), lists, pipeline_advice={"module": "net.head"})


retinanet = partial(_detector, RetinaNet, 8, 16)
fcos = partial(_detector, FCOS, 32, 8)


def _unet(kind: type[Model] = Classifier) -> Case:
    def build() -> Model:
        net = smp.Unet(
            "mobilenet_v2",
            encoder_weights=None,
            encoder_depth=3,
            decoder_channels=(16, 8, 4),
            classes=CLASSES,
        )
        return kind(frozen(net))

    return Case(build, _masked(), ddp_advice={"find_unused_parameters": True})


unet = partial(_unet)
unet_dice = partial(_unet, Dice)
