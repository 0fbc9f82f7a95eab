"""The models of the pipeline's benchmarks: eight layers in a row, and a batch."""

import torch
from torch import Tensor, nn

BATCH = 1024


def build(model: str) -> tuple[nn.Sequential, Tensor]:
    """The layers, always with the same weights, and a batch for them."""
    torch.manual_seed(0)
    if model == "mlp":
        return nn.Sequential(*(_block() for _ in range(8))), torch.randn(BATCH, 1024)
    layers = (
        nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True) for _ in range(8)
    )
    return nn.Sequential(*layers), torch.randn(BATCH // 16, 64, 256)


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.LayerNorm(1024))
