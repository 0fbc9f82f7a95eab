"""Models that each have something a strategy could get wrong: float64, always the same weights."""

from typing import Any

import boring
import torch
from torch import Tensor, nn

TOLERANCE = 1e-9
"""Of logged metrics."""


class Model(boring.Classifier):
    """`boring.Classifier` with another network."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = self.build().double()

    def build(self) -> nn.Module:
        raise NotImplementedError


class FrozenBatchNorm(Model):
    def build(self) -> nn.Module:
        # Lightning trains modules in the mode it finds them in.
        normalisation = nn.BatchNorm1d(8).eval()
        return nn.Sequential(nn.Linear(6, 8), normalisation, nn.Tanh(), nn.Linear(8, 3))


class NoDropout(Model):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.Tanh(), nn.Linear(8, 3))


class Recurrent(Model):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 5, num_layers=2, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.unflatten(1, (3, 2)))[0][:, -1])

    build = Net


class Tied(Model):
    def build(self) -> nn.Module:
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3))


class Embedded(Model):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4, padding_idx=0)
            self.head = nn.Linear(4 * 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding((x * 2).long().remainder(9)).flatten(1))

    build = Net


class GradientPenalty(Model):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        loss = nn.functional.cross_entropy(logits, batch[1]) + 0.3 * penalty
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


class WeightNorm(Model):
    def build(self) -> nn.Module:
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        return nn.Sequential(normed, nn.Tanh(), nn.Linear(8, 3))


class SpectralNorm(Model):
    def build(self) -> nn.Module:
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        return nn.Sequential(normed, nn.Tanh(), nn.Linear(8, 3))


class HalfFrozen(Model):
    def build(self) -> nn.Module:
        frozen = nn.Linear(6, 8).requires_grad_(False)
        return nn.Sequential(frozen, nn.Tanh(), nn.Linear(8, 3))


class Flattening(Recurrent):
    """Asks for the weights to be moved side by side, as models for several GPUs do."""

    class Net(Recurrent.Net):
        def forward(self, x: Tensor) -> Tensor:
            self.lstm.flatten_parameters()
            return super().forward(x)

    build = Net


MODELS = (
    *(FrozenBatchNorm, NoDropout, Recurrent, Flattening),
    *(Tied, Embedded, GradientPenalty, HalfFrozen),
)
UNPICKLABLE_MODELS = (WeightNorm, SpectralNorm)
"""Torch pickles no parametrised modules, so they cannot be sent to other processes."""


class UNet(Model):
    """Skips the cut; several kinds of operations between the layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)])
            self.up = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)])
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            skips = []
            for layer in self.down:
                skips.append(x)
                x = torch.tanh(layer(x))
            for layer in self.up:
                x = layer(x) * self.scale + skips.pop()
            return self.head(x.view(x.size(0), -1)) + self.shift

    build = Net


class Dictionaries(Model):
    """Several inputs and outputs, in structures; the module is called twice in a step."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.second = nn.Linear(8, 3)
            self.third = nn.Linear(5, 3)

        def forward(self, inputs: dict[str, Any], scale: Tensor | None = None) -> dict[str, Any]:
            hidden = torch.relu(self.first(inputs["x"] + inputs["pair"][0]))
            sequence, (h, _) = self.lstm(hidden.unflatten(1, (2, 4)))
            logits = self.second(hidden) + self.third(sequence[:, -1])
            if scale is not None:
                logits = logits * scale
            return {"logits": logits, "aux": (h[0], None), "name": "net"}

    build = Net

    def forward(self, x: Tensor) -> Tensor:
        pair = [x * 0.5, "unused"]
        once = self.net({"x": x, "pair": pair})
        twice = self.net({"x": x, "pair": pair}, scale=torch.tensor(0.5, dtype=x.dtype))
        assert once["name"] == "net"
        assert once["aux"][1] is None
        return once["logits"] + twice["logits"] + once["aux"][0][:, :3]
