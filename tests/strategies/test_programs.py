"""Programs that change the model, the batch or the optimizer's ways in the middle, under `dp`."""

import random
import types
from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu import DataParallelStrategy

STRATEGIES = (("auto", 1), ("dp", 2), ("dp", 3))


def equal(build: Callable[[], pl.LightningModule], **kwargs: Any) -> list[Any]:
    """Train on one device and on two and three replicas; the weights must be equal."""
    models = [build() for _ in STRATEGIES]
    callbacks = kwargs.pop("callbacks", list)
    kwargs = {"max_epochs": 2, "limit_val_batches": 0, **kwargs}
    for model, (strategy, devices) in zip(models, STRATEGIES, strict=True):
        trainer = boring.trainer(strategy, devices, callbacks=callbacks(), **kwargs)
        trainer.fit(model, boring.Blobs(8, 40))
    for model in models[1:]:
        boring.assert_same_weights(models[0], model)
    return models


# Modules that change


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")])
def test_pruning_in_the_middle_of_a_run(names: tuple[str, ...]) -> None:
    def callbacks() -> list[Any]:
        return [
            ModelPruning(
                "l1_unstructured",
                parameter_names=list(names),
                amount=0.3,
                use_global_unstructured=False,
            )
        ]

    equal(boring.Classifier, callbacks=callbacks, max_epochs=3)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.parametrizations.weight_norm(net[0]),
        lambda net: nn.utils.parametrizations.spectral_norm(net[0]),
        lambda net: parametrize.register_parametrization(net[2], "weight", nn.Identity()),
        lambda net: net.__setitem__(1, nn.ReLU()),
        lambda net: net[0].__setattr__("weight", nn.Parameter(net[0].weight.detach() * 0.5)),
        lambda net: net[0].register_parameter("bias", None),
    ],
    ids=["weight_norm", "spectral_norm", "parametrization", "module", "parameter", "no bias"],
)
def test_module_changed_by_a_callback(
    change: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Changing(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                torch.manual_seed(3)
                change(module.net)
                trainer.strategy.setup_optimizers(trainer)

    equal(boring.Classifier, callbacks=lambda: [Changing()])
    assert boring.told(caplog) == []


def test_layer_that_becomes_another_class_reaches_the_replicas() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    class Changing(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                module.net[0].__class__ = Scaled

    equal(boring.Classifier, callbacks=lambda: [Changing()])


# Optimizers of two passes


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation, with passes by hand or a closure."""

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self._parameters():
            change = 0.05 * parameter.grad / (parameter.grad.norm() + 1e-12)
            parameter.add_(change)
            self.state[parameter]["change"] = change

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self._parameters():
            parameter.sub_(self.state[parameter]["change"])
        super().step()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is None:
            return super().step()
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss

    def _parameters(self) -> list[Any]:
        return [p for g in self.param_groups for p in g["params"] if p.grad is not None]


class Sharp(boring.Classifier):
    def __init__(self, manual: str = "") -> None:
        super().__init__()
        self.manual = manual
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.manual:
            return super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer = optimizer.optimizer

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self._loss(batch)
            self.manual_backward(loss)
            return loss

        if self.manual == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
        return None

    def configure_optimizers(self) -> Any:
        return SAM(self.parameters(), lr=0.1)


@pytest.mark.parametrize("manual", ["", "closure", "passes"])
def test_sharpness_aware_minimisation_equals_one_device(manual: str) -> None:
    equal(lambda: Sharp(manual))


# Gradients within the step


class Meta(boring.Classifier):
    """Model-agnostic meta-learning: each shard's samples are tasks of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [self._task(x[None], y[None]) for x, y in zip(*batch, strict=True)]
        return torch.stack(losses).mean()

    def _task(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = dict(self.net.named_parameters())

        def loss_of(parameters: Any) -> Tensor:
            logits = torch.func.functional_call(self.net, parameters, (x,))
            return F.cross_entropy(logits, y)

        if self.how == "func.grad":
            gradients = torch.func.grad(loss_of)(parameters)
        else:
            found = torch.autograd.grad(
                loss_of(parameters), list(parameters.values()), create_graph=True
            )
            gradients = dict(zip(parameters, found, strict=True))
        return loss_of({key: p - 0.1 * gradients[key] for key, p in parameters.items()})


class PerSample(boring.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parameters = dict(self.net.named_parameters())

        def loss_of(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.net, parameters, (x[None],))
            return F.cross_entropy(logits, y[None])

        losses = torch.func.vmap(loss_of, in_dims=(None, 0, 0))(parameters, *batch)
        slopes = torch.func.vmap(torch.func.grad(loss_of, argnums=1), in_dims=(None, 0, 0))
        return losses.mean() + slopes(parameters, *batch).square().sum(1).mean()


@pytest.mark.parametrize("how", ["create_graph", "func.grad"])
def test_meta_learning_equals_one_device(how: str) -> None:
    equal(lambda: Meta(how), max_epochs=1)


def test_gradients_per_sample_equal_one_device() -> None:
    equal(PerSample)


# Random generators


class Drawing(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = {"new": np.random.default_rng(2), "old": np.random.RandomState(3)}
        self.python = [random.Random(4)]
        self.draws: list[tuple[float, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=self.torch, dtype=torch.float64)
        scale = self.numpy["new"].random() + self.numpy["old"].rand() + self.python[0].random()
        self.draws.append((noise[0, 0].item(), scale))
        return self._loss((batch[0] + noise * scale, batch[1]))


def test_generators_of_the_model_repeat_and_differ_between_replicas(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = [Drawing() for _ in range(2)]
    for model in models:
        boring.trainer("dp", 2, limit_val_batches=0).fit(model, boring.Blobs(8, 40))
    boring.assert_same_weights(*models, tolerance=0)
    assert models[0].draws == models[1].draws
    assert len(set(models[0].draws)) == 10
    fresh = Drawing()
    assert not torch.equal(models[0].torch.get_state(), fresh.torch.get_state())
    assert models[0].python[0].getstate() != fresh.python[0].getstate()
    assert boring.told(caplog) == []


# The batch


def test_first_layer_in_place_on_the_batch_equals_one_device() -> None:
    class InPlace(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ReLU(inplace=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x.clamp_(-2, 2)
            return self._loss((self.first(x), y)) + (self.net(x) ** 2).mean()

    for _ in range(3):
        equal(InPlace, max_epochs=1)


def test_shards_have_version_counters_of_their_own() -> None:
    versions: list[int] = []

    class Writing(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].mul_(1.0)
            versions.append(batch[0]._version)
            return super().training_step(batch, batch_idx)

    strategy = DataParallelStrategy(parity_check="off")  # which takes the step on its own, too
    boring.trainer(strategy, 3, limit_val_batches=0).fit(Writing(), boring.Blobs(6, 6))
    assert versions == [1, 1, 1]


# Errors and variables outside of the model

KEPT: dict[str, Any] = {}


class Remembering(boring.Classifier):
    """Keeps something of another size, or another graph, than its step's."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weights = torch.ones(len(batch[0]), dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1], reduction="none")
        if self.what == "weights":
            return (loss * self.weights).mean()
        total = loss.mean() + KEPT.get(self.what, 0)
        KEPT[self.what] = total
        return total


@pytest.mark.parametrize("what", ["weights", "graph"])
def test_errors_of_what_is_kept_have_a_note(what: str) -> None:
    KEPT.clear()
    with pytest.raises(RuntimeError, match=r"size of tensor|second time|inplace") as caught:
        boring.trainer("dp", 2).fit(Remembering(what), boring.Blobs(8, 40))
    KEPT.clear()
    (note,) = [n for n in caught.value.__notes__ if "Under `dp`" in n]
    assert ("len(x)" if what == "weights" else "detached") in note


def _globally(self: Any, output: Tensor) -> None:
    KEPT["features"] = output


def test_variables_outside_of_the_model_that_steps_write_to_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Hooked(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].register_forward_hook(lambda m, i, o: _globally(m, o.detach()))

    KEPT.clear()
    boring.trainer("dp", 2).fit(Hooked(), boring.Blobs(8, 40))
    KEPT.clear()
    (message,) = boring.told(caplog)
    assert "`KEPT`" in message


def test_variables_outside_that_are_only_read_are_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factors = {"scale": 2.0, "cache": None}

    class Reading(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * factors["scale"]

        def on_train_batch_end(self, *_: Any) -> None:
            factors["scale"] = 1.0

    boring.trainer("dp", 2).fit(Reading(), boring.Blobs(8, 40))
    assert boring.told(caplog) == []


def test_single_replica_keeps_everything_as_it_is() -> None:
    class Counting(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.state = types.SimpleNamespace(n=0, mean=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.state.n += 1
            self.state.mean = 0.9 * self.state.mean + batch[0].mean().item()
            return super().training_step(batch, batch_idx)

    model = Counting()
    data = TensorDataset(*(t[:1] for t in boring.blobs(1).tensors))
    boring.trainer("dp", 2, limit_val_batches=0).fit(model, DataLoader(data))
    assert model.state.n == 1
