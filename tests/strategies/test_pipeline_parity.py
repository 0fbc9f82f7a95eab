"""The pipeline against one device: what `test_parity` has no row for."""

from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from parity_models import TOLERANCE, Dictionaries, UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mgpu import PipelineStrategy


class NormedRecurrent(parity_models.Recurrent):
    """Weights that are computed anew at each call, of a layer that has a list of them."""

    class Net(parity_models.Recurrent.Net):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.lstm, "weight_hh_l0")

    build = Net


class Partly(parity_models.Model):
    """Parameters outside of the split module, and a loss that compares samples with each other."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.before = nn.Linear(6, 6).double()
            self.after = nn.Linear(3, 3).double()

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        contrast = nn.functional.cosine_similarity(logits[None], logits[:, None], dim=-1).mean()
        with torch.no_grad():
            teacher = self(batch[0] + 0.1).softmax(1)
        loss = nn.functional.cross_entropy(logits, batch[1]) + contrast
        loss = loss + nn.functional.cross_entropy(logits, teacher)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Contrastive(parity_models.Model):
    """Two towers whose outputs are held against those of all other samples, as in CLIP."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images = nn.Sequential(
                nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4)
            )
            self.texts = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4))
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            seen, read = self.images(images), self.texts(texts)
            seen = nn.functional.normalize(seen, dim=-1) * self.scale.exp()
            return seen, nn.functional.normalize(read, dim=-1)

    build = Towers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seen, read = self.net(batch[0][:, :3], batch[0][:, 3:])
        similar = seen @ read.t()
        pairs = torch.arange(len(similar))
        each = (nn.functional.cross_entropy(s, pairs) for s in (similar, similar.t()))
        loss = sum(each, torch.zeros((), dtype=torch.float64)) / 2
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        seen, read = self.net(batch[0][:, :3], batch[0][:, 3:])
        self.log("val_similar", (seen * read).sum(1).mean())


class InPlace(parity_models.Model):
    """Stages that begin with, and outputs that are changed by, operations in place."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        logits *= 0.5
        return logits


class Penalised(parity_models.Model):
    """A gradient with respect to the input, taken in the step."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, retain_graph=True)
        adversarial = self(batch[0] + 0.1 * slope.sign())
        loss = nn.functional.cross_entropy(logits, batch[1])
        loss = loss + nn.functional.cross_entropy(adversarial, batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Manual(parity_models.Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    build = Partly.build

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            loss = self._loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
        self.log("train_loss", loss, on_step=True, on_epoch=True)


MODELS: list[tuple[Callable[[], pl.LightningModule], dict[str, Any]]] = [
    (Contrastive, {"split_at": "net.texts"}),
    (Contrastive, {"checkpoint": "always"}),
    (UNet, {"split_at": "net.up.1"}),
    (NormedRecurrent, {}),
    (UNet, {"split_at": ["net.down.1"], "checkpoint": "always"}),
    (Dictionaries, {"split_at": "lstm", "split_args": ["inputs"]}),
    (
        Dictionaries,
        {"split_at": "second", "checkpoint": "except_last", "split_args": [0]},
    ),
    (Partly, {"balance": [1, 3]}),
    (Partly, {"checkpoint": "always"}),
    (InPlace, {"split_at": "net.1", "checkpoint": "never"}),
    (InPlace, {"split_at": "net.1", "checkpoint": "always"}),
    (Penalised, {}),
    (Penalised, {"checkpoint": "always"}),
    (parity_models.HalfFrozen, {"split_at": "net.2", "checkpoint": "always"}),
]


@pytest.mark.parametrize(("build", "options"), MODELS)
@pytest.mark.parametrize("deferred", [True, False])
def test_parity_of_models(
    build: Callable[[], pl.LightningModule], options: dict[str, Any], deferred: bool
) -> None:
    _compare(build, PipelineStrategy(defer_weight_gradients=deferred, **options))


def test_parity_manual_optimisation() -> None:
    alone, split = Manual(), Manual()
    for model, strategy, devices in ((alone, "auto", 1), (split, PipelineStrategy(), 2)):
        boring.trainer(strategy, devices).fit(model, datamodule=boring.Blobs(10))
    _assert_equal(alone, split)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 10, 64])
def test_any_number_of_chunks_gives_the_same(chunks: int) -> None:
    _compare(UNet, PipelineStrategy(chunks=chunks))


@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
def test_modes_of_checkpointing_give_the_same(checkpoint: Any) -> None:
    _compare(UNet, PipelineStrategy(checkpoint=checkpoint), devices=4)


@pytest.mark.parametrize(("devices", "stages_per_device"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
@pytest.mark.parametrize("deferred", [True, False])
def test_several_stages_on_a_device_give_the_same(
    devices: int, stages_per_device: int, checkpoint: Any, deferred: bool
) -> None:
    options: Any = {"stages_per_device": stages_per_device, "checkpoint": checkpoint}
    strategy = PipelineStrategy(chunks=5, defer_weight_gradients=deferred, **options)
    _compare(UNet, strategy, devices)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (
            Dictionaries,
            {"split_at": ["lstm", "second", "third"], "split_args": ["inputs"]},
        ),
        (Partly, {"balance": [1, 1, 1, 1]}),
        (Contrastive, {}),
        (InPlace, {"devices": 1, "split_at": "net.1"}),
        (Penalised, {"devices": 1}),
        (parity_models.HalfFrozen, {"devices": 1, "checkpoint": "always"}),
        (parity_models.Tied, {}),
    ],
)
def test_parity_of_models_with_several_stages_on_a_device(
    build: Callable[[], pl.LightningModule], options: dict[str, Any]
) -> None:
    devices = options.pop("devices", 2)
    _compare(build, PipelineStrategy(stages_per_device=2, **options), devices)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize(
    "options",
    [
        {"stages_per_device": "auto"},
        {"stages_per_device": "auto", "balance": "memory", "chunks": "auto"},
        {"stages_per_device": 2, "balance": "auto"},
    ],
)
def test_parity_of_chosen_stages(options: dict[str, Any], checkpoint: Any) -> None:
    _compare(UNet, PipelineStrategy(checkpoint=checkpoint, **options))


def test_parity_of_manual_optimisation_with_several_stages_on_a_device() -> None:
    alone, split = Manual(), Manual()
    strategy = PipelineStrategy(stages_per_device=2)
    for model, how, devices in ((alone, "auto", 1), (split, strategy, 2)):
        boring.trainer(how, devices).fit(model, datamodule=boring.Blobs(10))
    _assert_equal(alone, split)


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "bf16-true"])
def test_parity_in_other_precisions(precision: Any) -> None:
    alone, split = Partly().float(), Partly().float()
    data = boring.Blobs(10)
    data.dtype = torch.float32
    for model, strategy, devices in ((alone, "auto", 1), (split, PipelineStrategy(chunks=1), 2)):
        trainer = boring.trainer(strategy, devices, precision=precision)
        trainer.fit(model, DataLoader(_float_batches(), batch_size=None))
    _assert_equal(alone, split, 0)


def test_parity_with_a_gradient_scaler() -> None:
    scalers = []
    weights = []
    for strategy, devices in (("auto", 1), (PipelineStrategy(chunks=1), 2)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        model = Partly().float()
        trainer = boring.trainer(strategy, devices, plugins=[plugin], gradient_clip_val=0.1)
        trainer.fit(model, DataLoader(_float_batches(), batch_size=None))
        scalers.append(scaler.get_scale())
        weights.append(model.state_dict())
    assert scalers[0] == scalers[1] > 2.0**14
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


class Normalised(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(
            *(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh()),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        )


@pytest.mark.parametrize("stages", [2, 3])
def test_parity_of_batch_normalisation_in_one_chunk(stages: int) -> None:
    _compare(Normalised, PipelineStrategy(chunks=1), stages)


@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
def test_running_statistics_are_those_of_the_whole_batch(checkpoint: Any) -> None:
    alone, split = Normalised(), Normalised()
    strategy = PipelineStrategy(chunks=3, checkpoint=checkpoint)
    for model, how, devices in ((alone, "auto", 1), (split, strategy, 2)):
        boring.trainer(how, devices, max_steps=5, max_epochs=-1).fit(
            model, datamodule=boring.Blobs(10)
        )
    # The first layer sees the same on one device; later ones do as long as weights are equal.
    first, expected = split.net[0].state_dict(), alone.net[0].state_dict()
    assert expected["num_batches_tracked"] == 5
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], expected[name], rtol=0, atol=1e-12)


def test_running_statistics_per_chunk_if_not_deferred() -> None:
    model = Normalised()
    strategy = PipelineStrategy(chunks=3, deferred_batch_norm=False, checkpoint="always")
    boring.trainer(strategy, 2, max_steps=4, max_epochs=-1, num_sanity_val_steps=0).fit(
        model, datamodule=boring.Blobs(12)
    )
    assert model.net[0].num_batches_tracked == 12


def _compare(
    build: Callable[[], pl.LightningModule], strategy: PipelineStrategy, devices: int = 2
) -> None:
    alone, split = build(), build()
    options: dict[str, Any] = {"max_epochs": 4, "accumulate_grad_batches": 2}
    expected = boring.trainer("auto", 1, **options)
    actual = boring.trainer(strategy, devices, **options)
    for trainer, model in ((expected, alone), (actual, split)):
        # Batches of 10, 10, 10, 10 and 8; 7 in validation.
        data = boring.Blobs(10)
        val = boring.Blobs(7).val_dataloader()
        trainer.fit(model, data.train_dataloader(), val)
    _assert_equal(alone, split)
    assert actual.callback_metrics.keys() == expected.callback_metrics.keys()
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(
            actual.callback_metrics[name], value, rtol=0, atol=TOLERANCE, msg=name
        )


def _assert_equal(
    alone: pl.LightningModule, split: pl.LightningModule, tolerance: float = TOLERANCE
) -> None:
    before = type(alone)().state_dict()
    boring.assert_same_weights(alone, split, tolerance)
    assert any(not torch.equal(before[n], v) for n, v in alone.state_dict().items()), "trained"


def _float_batches() -> list[list[Tensor]]:
    x, y = boring.blobs(dtype=torch.float32).tensors
    return [list(pair) for pair in zip(x.split(10), y.split(10), strict=True)]
