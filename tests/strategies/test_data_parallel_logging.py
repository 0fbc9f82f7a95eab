"""What steps log and measure under `dp`, against one device."""

from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
)


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step or 0, dict(metrics)))


def compare(
    build: Callable[[], pl.LightningModule], devices: int = 2, samples: int = 25, **kwargs: Any
) -> tuple[Memory, Memory]:
    """Everything that reaches loggers and callbacks is the same on one device and on several."""
    found = []
    for strategy, count in (("auto", 1), ("dp", devices)):
        logger = Memory()
        trainer = boring.trainer(
            strategy, count, logger=logger, max_epochs=2, log_every_n_steps=1, **kwargs
        )
        model = build()
        trainer.fit(model, boring.Blobs(10, samples))
        trainer.test(model, boring.Blobs(10, 25), verbose=False)
        found.append((logger, dict(trainer.callback_metrics), dict(trainer.progress_bar_metrics)))
    (one, one_callback, one_bar), (two, two_callback, two_bar) = found
    assert one.logged
    assert len(one.logged) == len(two.logged)
    for (step, metrics), (other_step, others) in zip(one.logged, two.logged, strict=True):
        assert step == other_step
        assert others == pytest.approx(metrics, abs=1e-6), step
    torch.testing.assert_close(two_callback, one_callback, rtol=0, atol=1e-6)
    assert two_bar == pytest.approx(one_bar, abs=1e-6)
    return one, two


@pytest.mark.parametrize("devices", [2, 3])
def test_values_reduced_in_every_way(devices: int) -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = super().training_step(batch, batch_idx)
            both: dict[str, Any] = {"on_step": True, "on_epoch": True}
            self.log("labels", y.sum(), reduce_fx="sum", **both)
            self.log("largest", x.max(), reduce_fx=torch.max, **both)
            self.log("smallest", x.min(), reduce_fx="min", prog_bar=True, **both)
            ones = (y == 1).sum()
            self.log("x of ones", x[y == 1].sum() / ones.clamp(min=1), batch_size=int(ones), **both)
            self.log_dict({"a": x.mean(), "b": x.mean() * 2}, prog_bar=True)
            self.log("number", float(x.mean()), on_epoch=True)
            return loss

    compare(Model, devices)


@pytest.mark.parametrize("size", [10, 1, 16])  # of the batches, of none, of other batches
def test_batch_size_given_as_a_constant_says_nothing_of_shards(size: int) -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("constant", batch[0].mean(), batch_size=size, on_step=True, on_epoch=True)
            return loss

    compare(Model, samples=45)


def test_same_name_logged_from_hooks_and_steps() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx % 2:
                self.log("sometimes", batch[0].mean())
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("outside", outputs["loss"])

    compare(Model)


def test_override_of_log_is_called_once_for_each_value() -> None:
    names: list[str] = []

    class Model(boring.Classifier):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            names.append(name)
            super().log(f"mine/{name}", value, *args, **kwargs)

    trainer = boring.trainer("dp", 2, limit_val_batches=0)
    trainer.fit(Model(), boring.Blobs(24, 48))
    assert names == ["train_loss"] * 2
    assert "mine/train_loss" in trainer.callback_metrics


def test_replicas_that_log_different_kinds_of_values() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first = bool(batch[1][0] == 0)
            self.log("mixed", 0.0 if first else batch[0].new_tensor(3.0))
            self.log("sized", 1.0, **({"batch_size": 2} if first else {}))
            return super().training_step(batch, batch_idx)

    trainer = boring.trainer("dp", 2, limit_val_batches=0)
    trainer.fit(Model(), boring.Blobs(4, 4))  # labels 0 1 | 2 0
    assert trainer.callback_metrics["mixed"].item() == 1.5
    assert trainer.callback_metrics["sized"].item() == 1


class Measured(boring.Classifier):
    """Measures with metric objects kept in every way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.area = MulticlassAUROC(3)
        self.correlation = torchmetrics.PearsonCorrCoef()
        self.average = torchmetrics.MeanMetric()
        self.largest = torchmetrics.MaxMetric()
        self.collection = torchmetrics.MetricCollection(
            {"f1": MulticlassF1Score(3), "precision": MulticlassPrecision(3)}
        )
        self.in_dict = nn.ModuleDict({"f1": MulticlassF1Score(3)})
        self.plain = {"accuracy": MulticlassAccuracy(3)}
        self.minmax = torchmetrics.MinMaxMetric(MulticlassAccuracy(3, average="micro"))
        self.computed: list[dict[str, Tensor]] = []

    def measure(self, batch: Any) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.area.update(logits.softmax(1), batch[1])
        self.correlation(logits[:, 0], batch[1].double())
        self.average.update(logits, torch.ones_like(logits))
        self.largest.update(logits)
        self.collection(logits, batch[1])
        self.in_dict["f1"].update(logits, batch[1])
        self.plain["accuracy"].update(logits, batch[1])
        self.minmax.update(logits, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.measure(batch)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("area", self.area, on_step=False, on_epoch=True)
        self.log("in_dict", self.in_dict["f1"], on_step=False, on_epoch=True)
        self.log_dict(self.collection, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        others = {
            "correlation": self.correlation,
            "average": self.average,
            "largest": self.largest,
            "plain": self.plain["accuracy"],
        }
        values = {name: metric.compute() for name, metric in others.items()}
        self.log_dict({**values, **{f"minmax_{k}": v for k, v in self.minmax.compute().items()}})
        for metric in (*others.values(), self.minmax):
            metric.reset()


@pytest.mark.filterwarnings("ignore:No negative samples", "ignore:No positive samples")
@pytest.mark.parametrize("devices", [2, 3])
def test_metric_objects(devices: int) -> None:
    one, _ = compare(Measured, devices)
    logged = {name for _, metrics in one.logged for name in metrics}
    assert {"accuracy", "area", "f1", "precision", "correlation", "minmax_raw"} <= logged


def test_metric_objects_of_validation() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MulticlassAccuracy(3)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.metric(self(batch[0]), batch[1])
            self.log("val_metric", self.metric)

    compare(Model)


@pytest.mark.parametrize("name", ["compute", "reset"])
def test_metrics_that_know_of_a_shard_only_are_refused(name: str) -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MulticlassAccuracy(3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.metric.update(self(batch[0]), batch[1])
            getattr(self.metric, name)()
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=rf"`MulticlassAccuracy\.{name}\(\)` in a step"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_metrics_made_after_the_sanity_check() -> None:
    class Model(boring.Classifier):
        def on_train_start(self) -> None:
            self.late = {"accuracy": MulticlassAccuracy(3, average="micro")}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.late["accuracy"].update(self(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    model = Model()
    boring.trainer("dp", 2).fit(model, boring.Blobs(10, 50))
    metric = model.late["accuracy"]
    assert int(metric.tp + metric.fn) == 50


def test_a_step_that_fails_leaves_metrics_alone() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MulticlassAccuracy(3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.metric.update(self(batch[0]), batch[1])
            if batch_idx == 1:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    model = Model()
    with pytest.raises(RuntimeError, match="no more"):
        boring.trainer("dp", 2).fit(model, boring.Blobs(8, 48))
    assert model.metric._update_count == 1
    assert int(model.metric.tp.sum() + model.metric.fn.sum()) == 8
