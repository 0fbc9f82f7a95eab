"""A transformer encoder for images and for sequences of tokens."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mgpu.demo.classifier import Classifier, image_size


class Transformer(Classifier):
    """Encoder layers over a sequence, and a linear layer on the average of their outputs.

    Without `vocab_size`, inputs are float images of shape (B, *image_shape) and each row of pixels
    is one element of the sequence. With it, inputs are int64 tokens of shape (B, L), L up to
    `sequence_length`. Only the input layer in use is built, so every parameter gets a gradient.

    Args:
        image_shape: (channels, height, width); unused with `vocab_size`.
        num_classes: Number of logits.
        vocab_size: Number of different tokens; None for images.
        sequence_length: The longest sequence of tokens; required with `vocab_size`, else unused.
        dim: Width of the model; a multiple of `heads`.
        heads: Attention heads in each layer.
        layers: Number of encoder layers.
        dropout: Dropout probability inside the layers.
        lr: Adam's learning rate.

    Raises:
        ValueError: If `vocab_size` comes without `sequence_length`, or `dim` does not divide.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        vocab_size: int | None = None,
        sequence_length: int | None = None,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        lr: float = 1e-3,
    ) -> None:
        image_shape = image_size(image_shape)
        if dim % heads:
            raise ValueError(f"`dim` must be a multiple of `heads` (dim: {dim}, heads: {heads})")
        embed: nn.Module
        if vocab_size is None:
            embed = RowEmbedding(image_shape, dim)
        elif sequence_length is None:
            raise ValueError(f"`vocab_size` ({vocab_size}) needs a `sequence_length` as well")
        else:
            embed = TokenEmbedding(vocab_size, sequence_length, dim)
        encoder = [encoder_layer(dim, heads, dropout) for _ in range(layers)]
        super().__init__(transformer(embed, encoder, dim, num_classes), lr=lr)
        self.save_hyperparameters()


class RowEmbedding(nn.Module):
    """Images of shape (B, C, H, W) to sequences of shape (B, H, dim)."""

    def __init__(self, image_shape: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.linear = nn.Linear(channels * width, dim)
        self.position = position_code(height, dim)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.linear(images.transpose(1, 2).flatten(2))
        return rows + self.position


class TokenEmbedding(nn.Module):
    """Tokens, int64 of shape (B, L), to sequences of shape (B, L, dim)."""

    def __init__(self, vocab_size: int, sequence_length: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = position_code(sequence_length, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(tokens)
        return embedded + self.position[: tokens.size(1)]


class MeanOverSequence(nn.Module):
    """Sequences of shape (B, L, dim) to vectors of shape (B, dim)."""

    def forward(self, sequence: Tensor) -> Tensor:
        return sequence.mean(dim=1)


def position_code(length: int, dim: int) -> nn.Parameter:
    """Make the learnt vectors that tell positions apart, of shape (length, dim).

    They start on the scale of the embedded inputs: with the customary 0.02 a small set like digits
    takes far longer to find out that the order matters.
    """
    return nn.Parameter(0.5 * torch.randn(length, dim))


def encoder_layer(dim: int, heads: int, dropout: float) -> nn.TransformerEncoderLayer:
    """Build one layer: normalises first, which trains well without a warm-up."""
    return nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
    )


def transformer(
    embed: nn.Module, layers: Sequence[nn.Module], dim: int, num_classes: int
) -> nn.Sequential:
    """Build the network as one sequence: embed, layers, norm, pool, head.

    `nn.TransformerEncoder` would hold the layers too, but its `forward` looks at the input's values
    and cannot be traced, so no pipeline could be cut between them.
    """
    return nn.Sequential(
        OrderedDict(
            embed=embed,
            layers=nn.Sequential(*layers),
            norm=nn.LayerNorm(dim),
            pool=MeanOverSequence(),
            head=nn.Linear(dim, num_classes),
        )
    )
