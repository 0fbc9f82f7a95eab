"""Networks of MONAI."""

from functools import partial
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor
from zoo import BATCH, STEPS, Case
from zoo_images import CLASSES, Classifier, frozen


def _scans(*shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(10)
    size = (BATCH * STEPS, *shape)
    scans = torch.randn(BATCH * STEPS, 1, *shape, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, CLASSES, size, generator=generator)
    return list(zip(scans, masks, strict=True))


def _case(net: Any, *arguments: Any, shape: tuple[int, ...] = (32, 32), **options: Any) -> Case:
    return Case(
        lambda: Classifier(frozen(net(*arguments, **options))),
        _scans(*shape),
        ddp_advice={"find_unused_parameters": True},
    )


unet = partial(
    *(_case, nets.UNet, 3, 1, CLASSES, (4, 8, 16), (2, 2)), shape=(8, 8, 8), num_res_units=1
)
attention_unet = partial(_case, nets.AttentionUnet, 2, 1, CLASSES, (4, 8), (2,), dropout=0.0)
dyn_unet = partial(
    *(_case, nets.DynUNet, 2, 1, CLASSES, [3, 3, 3], [1, 2, 2], [2, 2]), filters=[4, 8, 16]
)
segresnet = partial(
    *(_case, nets.SegResNet, 2, 8, 1, CLASSES), blocks_down=(1, 1, 1), blocks_up=(1, 1)
)
unetr = partial(
    *(_case, nets.UNETR, 1, CLASSES, 32),
    feature_size=4,
    hidden_size=24,
    mlp_dim=32,
    num_heads=2,
    spatial_dims=2,
)
