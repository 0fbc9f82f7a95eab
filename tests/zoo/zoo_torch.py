"""Models of torch's own layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BATCH, STEPS, Case, Model

VOCABULARY, LENGTH, WIDTH = 20, 8, 16


class _Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)
        self.time = 1 if batch_first else 0

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        if self.time == 0:
            features = features.transpose(0, 1)
        return self.head(self.encoder(features, src_key_padding_mask=padding).mean(self.time))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.lstm(self.into(features))[0][:, -1])


class Classifies(Model):
    def outputs(self, batch: Any) -> Tensor:
        return self.net(batch[0], batch[1])

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(batch), batch[2])


class Translates(Model):
    """A bare `nn.Transformer`, whose inputs are computed in the step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).double()
        self.head = nn.Linear(WIDTH, VOCABULARY).double()

    def outputs(self, batch: Any) -> Tensor:
        source, target = (self.embedding(ids) for ids in batch)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
        return self.head(self.net(source, target, tgt_mask=mask))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(batch).flatten(0, 1), batch[1].flatten())


def _features() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(BATCH * STEPS, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return [
        (value, torch.arange(LENGTH) >= 3 + i % 6, torch.tensor(i % 3))
        for i, value in enumerate(values)
    ]


def _classifies(net: Any) -> Case:
    return Case(lambda: Classifies(net()), _features())


encoder = partial(_classifies, partial(_Encoder, True))
time_first = partial(_classifies, partial(_Encoder, False))
lstm = partial(_classifies, _Recurrent)


def sequences() -> Case:
    generator = torch.Generator().manual_seed(12)
    ids = torch.randint(0, VOCABULARY, (BATCH * STEPS, LENGTH), generator=generator)
    net = partial(nn.Transformer, WIDTH, 2, 2, 2, 32, 0.0, batch_first=True)
    return Case(lambda: Translates(net()), [(entry, entry.flip(0)) for entry in ids])
