"""The first batch, computed whole and in shards: what is told, what is not, what is left behind."""

import contextlib
import io
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import numpy as np
import parity_models
import pytest
import torch
from configs import config
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_mgpu import DataParallelStrategy, ParityError, Shard

LOGGER = "lightning_mgpu"
X, Y = boring.blobs().tensors


class Net(boring.Classifier):
    """`boring.Classifier` with steps given as functions of the model and the batch."""

    def __init__(self, step: Callable[[Any, Any], Any], **steps: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.steps = {"training_step": step, **steps}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.steps["training_step"](self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.steps.get("validation_step", _nothing)(self, batch)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.steps["test_step"](self, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.steps["predict_step"](self, batch)


def _nothing(self: Any, batch: Any) -> None:
    return None


def loss_of(self: Any, batch: Any) -> Tensor:
    return F.cross_entropy(self(batch[0]), batch[1])


def loader(*columns: Tensor, size: int = 8, collate: Any = None) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(columns or (X, Y))), size, collate_fn=collate)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(LOGGER) and record.levelno >= logging.WARNING
    ]


def fit(model: Any, data: Any = None, devices: int = 2, parity: Any = "warn", **kwargs: Any) -> Any:
    options = {key: kwargs.pop(key) for key in ("scatter_fn", "gather_fn") if key in kwargs}
    strategy = DataParallelStrategy(parity_check=parity, **options)
    trainer = boring.trainer(strategy, devices, limit_train_batches=2, **kwargs)
    trainer.fit(model, loader() if data is None else data)
    return trainer


# What differs is told.


def class_weights(self: Any, batch: Any) -> Tensor:
    weight = torch.tensor([1.0, 10.0, 3.0], dtype=torch.float64)
    return F.cross_entropy(self(batch[0]), batch[1], weight=weight)


def summed(self: Any, batch: Any) -> Tensor:
    return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


def ignoring(self: Any, batch: Any) -> Tensor:
    return F.cross_entropy(self(batch[0]), batch[1], ignore_index=0)


def unlabelled(self: Any, batch: Any) -> Tensor:
    y = torch.where(batch[0][:, 0] == X[0, 0], batch[1], -100)  # the first sample has a label
    return F.cross_entropy(self(batch[0]), y)


def contrastive(self: Any, batch: Any) -> Tensor:
    h = F.normalize(self(batch[0]), dim=1)
    return F.cross_entropy(h @ h.T / 0.5, torch.arange(len(h)))


def normalised(self: Any, batch: Any) -> Tensor:
    x = (batch[0] - batch[0].mean(0)) / batch[0].std(0)
    return F.cross_entropy(self(x), batch[1])


def mixed(self: Any, batch: Any) -> Tensor:
    logits = self(0.7 * batch[0] + 0.3 * batch[0].flip(0))
    return 0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * F.cross_entropy(logits, batch[1].flip(0))


def episode(self: Any, batch: Any) -> Tensor:
    h = self(batch[0])
    half = len(h) // 2
    return torch.cdist(h[half:], h[:half]).min(1).values.mean()


def token_mean(self: Any, batch: Any) -> Tensor:
    lengths = batch[1] + 1
    mask = torch.arange(6) < lengths[:, None]
    return (batch[0] * mask * self.net[0].weight[0]).sum() / mask.sum()


DIFFERENT = {
    class_weights: "mean over something other than samples",
    summed: "is the sum of the shards' losses",
    ignoring: r"Shard\(batch, size\)",
    unlabelled: "Loss is NaN on replica 1 of 2 on cpu, samples 4 to 7",
    contrastive: "depends on the other samples of the batch",
    normalised: "use `strategy='pipeline'`",
    mixed: "mixup",
    episode: "episodes",
    token_mean: "number of tokens",
}


@pytest.mark.parametrize("step", DIFFERENT, ids=lambda step: step.__name__)
def test_loss_that_is_no_mean_over_samples_is_told_once(
    step: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fit(Net(step), max_epochs=2)
    (text,) = warnings_of(caplog)
    assert "`training_step` gives different results on 2 shards (of 4, 4 samples)" in text
    assert "`loss`: " in text
    assert " instead of " in text
    assert "parity_check='off'" in text
    assert re.search(DIFFERENT[step], text)


@pytest.mark.parametrize("step", DIFFERENT, ids=lambda step: step.__name__)
def test_error_comes_before_weights_change(step: Any) -> None:
    model, untouched = Net(step), Net(step)
    with pytest.raises(ParityError, match=r"`loss`: .* instead of"):
        fit(model, parity="error")
    boring.assert_same_weights(model, untouched, 0)


@pytest.mark.parametrize("step", DIFFERENT, ids=lambda step: step.__name__)
def test_check_that_is_off_says_nothing(step: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(Net(step), parity="off")
    assert warnings_of(caplog) == []


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parity_check='loud'.*'warn', 'error', or 'off'"):
        DataParallelStrategy(parity_check="loud")  # type: ignore[arg-type]


def test_logged_values_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        self.log("n", float(len(batch[0])))
        self.log_dict({"largest": batch[0].max(), "right": batch[0].mean()})
        return loss_of(self, batch)

    fit(Net(step))
    (text,) = warnings_of(caplog)
    assert "`logged['n']`: 4 instead of 8" in text
    assert "`logged['largest']`" in text
    assert "`logged['right']`" not in text
    assert "`loss`" not in text
    assert "reduce_fx='sum'" in text


def test_logged_as_they_are_reduced_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        self.log("n", float(len(batch[0])), reduce_fx="sum")
        self.log("largest", batch[0].max(), reduce_fx="max")
        self.log("weighed", batch[0].mean(), batch_size=len(batch[0]))
        return loss_of(self, batch)

    fit(Net(step))
    assert warnings_of(caplog) == []


def confusion(self: Any, batch: Any) -> Tensor:
    pairs = self(batch[0]).argmax(1) * 3 + batch[1]
    return torch.bincount(pairs, minlength=9).reshape(3, 3)


def test_output_whose_rows_are_no_samples_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def gram(self: Any, batch: Any) -> Tensor:
        return batch[0][:, :4].T @ batch[0][:, :4]  # as many rows as a shard has samples

    boring.trainer(DataParallelStrategy(), 2).predict(Net(loss_of, predict_step=gram), loader())
    (text,) = warnings_of(caplog)
    assert "`predict_step` gives different results" in text
    assert "`output`: shape (8, 4) instead of (4, 4)" in text
    assert "`output` has 4 rows for 8 samples" in text
    assert "gather_fn" in text


def test_output_without_a_batch_dimension_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shapes \(3, 3\) and \(3, 3\).*gather_fn"):
        boring.trainer("dp", 2).predict(Net(loss_of, predict_step=confusion), loader())


def test_gather_fn_that_puts_outputs_right_is_no_difference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = DataParallelStrategy(gather_fn=lambda outputs, sizes: sum(outputs))
    boring.trainer(strategy, 2).predict(Net(loss_of, predict_step=confusion), loader())
    assert warnings_of(caplog) == []


def test_output_with_the_batch_behind_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Any:
        return {"logits": self(batch[0]).T.contiguous()[:, :, None].expand(3, -1, 2)}

    boring.trainer(DataParallelStrategy(gather_fn=lambda outputs, sizes: outputs[0]), 2).predict(
        Net(loss_of, predict_step=step), loader()
    )
    (text,) = warnings_of(caplog)
    assert "`output['logits']` of shape (3, 8, 2) has the samples as dimension 1" in text


def test_outputs_of_a_training_step_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Any:
        return {"loss": loss_of(self, batch), "spread": batch[0].std()}

    fit(Net(step))
    (text,) = warnings_of(caplog)
    assert "`output['spread']`" in text


def test_output_of_another_length_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Any:
        return ["a", "b", "c"]

    strategy = DataParallelStrategy(gather_fn=lambda outputs, _: [x for o in outputs for x in o])
    boring.trainer(strategy, 2).predict(Net(loss_of, predict_step=step), loader())
    (text,) = warnings_of(caplog)
    assert "`output`: 6 entries instead of 3" in text
    assert "an entry of a list, for each sample" in text
    assert "class weights" not in text


def test_list_that_went_whole_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def collate(samples: Any) -> Any:
        x, y = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"x": x, "weights": [float(i) for i in range(3)], "y": y}

    def step(self: Any, batch: Any) -> Any:
        weights = torch.tensor(batch["weights"], dtype=torch.float64)
        rows = torch.arange(len(batch["x"])) % 3
        return (
            F.cross_entropy(self(batch["x"]), batch["y"], reduction="none") * weights[rows]
        ).mean()

    fit(Net(step), loader(collate=collate))
    (text,) = warnings_of(caplog)
    assert "`batch['weights']` (a list of 3) went whole to every replica" in text


def test_layer_without_running_statistics_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(loss_of)
    model.net.insert(1, nn.BatchNorm1d(8, track_running_stats=False, dtype=torch.float64))
    fit(model)
    (text,) = warnings_of(caplog)
    assert "`net.1` (a BatchNorm1d) keeps no running statistics" in text


def test_metric_that_is_told_something_else_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> None:
        self.accuracy(self(batch[0] - batch[0].mean(0) * 3), batch[1])
        self.log("accuracy", self.accuracy)

    model = Net(loss_of, test_step=step)
    model.accuracy = MulticlassAccuracy(3)
    boring.trainer(DataParallelStrategy(), 2).test(model, loader(size=16))
    (text,) = warnings_of(caplog)
    assert "`accuracy`: " in text


def test_value_of_a_metric_that_is_no_mean_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> None:
        self.log("f1", self.f1((batch[0][:, 0] > 0).long(), batch[1]))

    model = Net(loss_of, test_step=step)
    model.f1 = MulticlassF1Score(3)
    boring.trainer(DataParallelStrategy(), 2).test(model, loader(size=16))
    (text,) = warnings_of(caplog)
    assert "`logged['f1']`: " in text


def test_each_kind_of_step_and_structure_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return summed(self, (batch["x"], batch["y"]))
        return loss_of(self, batch)

    batches: list[Any] = [(X[:8], Y[:8])] * 3 + [{"x": X[:9], "y": Y[:9]}] * 3
    model = Net(step, validation_step=lambda self, batch: summed(self, batch))
    trainer = boring.trainer(DataParallelStrategy(), 2)
    trainer.fit(model, DataLoader(batches, batch_size=None), loader())
    texts = warnings_of(caplog)
    assert [text.split("`")[1] for text in texts] == ["validation_step", "training_step"]
    assert "(of 5, 4 samples)" in texts[1]


def test_shards_weighed_by_their_own_denominator_are_no_difference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = torch.tensor([1.0, 10.0, 3.0], dtype=torch.float64)

    def scatter(batch: Any, count: int) -> list[Shard]:
        columns = [column.chunk(count) for column in batch]
        return [Shard((x, y), weight[y].sum().item()) for x, y in zip(*columns, strict=True)]

    fit(Net(class_weights), scatter_fn=scatter)
    assert warnings_of(caplog) == []


def test_later_nan_on_one_replica_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    y = Y.clone()
    y[12:16] = -100
    fit(Net(loss_of), loader(X, y), limit_val_batches=0, max_epochs=2)
    (text,) = warnings_of(caplog)
    assert "`training_step`: loss is NaN on replica 1 of 2 on cpu, samples 4 to 7" in text


# What is right is not warned of.


@pytest.mark.parametrize("kind", parity_models.MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("devices", [2, 3])
def test_parity_models_are_no_difference(
    kind: Any, devices: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = boring.trainer(DataParallelStrategy(parity_check="error"), devices)
    model, data = kind(), boring.Blobs(8)
    trainer.fit(model, data)
    trainer.test(model, data)
    trainer.predict(model, data)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", parity_models.UNPICKLABLE_MODELS, ids=lambda kind: kind.__name__)
def test_parametrised_models_are_no_difference(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit(kind(), parity="error")
    assert not [text for text in warnings_of(caplog) if "gives different results" in text]


@pytest.mark.parametrize(
    "precision",
    ["32-true", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16-mixed", "bf16-true"))],
)
@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet", "transformer"])
def test_demo_models_are_no_difference(name: str, precision: Any) -> None:
    torch.manual_seed(0)
    cfg = config(f"model={name}")
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    strategy = DataParallelStrategy(parity_check="error")
    options: Any = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    trainer = boring.trainer(strategy, 2, precision=precision, **options)
    trainer.fit(model, data)
    trainer.test(model, data)


class Noise(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "functional":
            return F.dropout(x, 0.5, self.training)
        if self.kind == "always":
            return F.dropout(x, 0.5)
        if self.kind == "noise":
            return x + torch.randn_like(x)
        if self.kind == "depth":
            return x * (torch.rand(len(x), 1) > 0.3) if self.training else x
        if self.kind == "numpy":
            return x * np.random.rand()
        if self.kind == "python":
            return x * random.random()
        if self.kind == "generator":
            return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        if self.kind == "numpy generator":
            return x * self.numpy.random()
        if self.kind == "permutation":
            return x[torch.randperm(len(x))]
        return x


NOISES = (
    *("functional", "always", "noise", "depth", "numpy", "python", "generator"),
    *("numpy generator", "permutation"),
)


def noisy(kind: str) -> Any:
    model = Net(loss_of, validation_step=lambda self, batch: self.log("val", loss_of(self, batch)))
    model.net.insert(1, Noise(kind))
    return model


@pytest.mark.parametrize("kind", NOISES)
def test_random_draws_are_no_difference(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    trainer = boring.trainer(DataParallelStrategy(parity_check="error"), 2, max_steps=1)
    trainer.fit(noisy(kind), loader(), loader())
    assert not [text for text in warnings_of(caplog) if "gives different results" in text]


@pytest.mark.parametrize("kind", ["functional", "depth"])
def test_what_differs_is_seen_beside_draws_of_training(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = noisy(kind)
    model.steps["training_step"] = class_weights
    fit(model)
    assert "`loss`: " in warnings_of(caplog)[0]


def test_dropout_and_batch_normalisation_are_no_difference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net(loss_of)
    model.net.insert(1, nn.BatchNorm1d(8, dtype=torch.float64))
    model.net.insert(2, nn.Dropout(0.5))
    fit(model, parity="error")
    assert not [text for text in warnings_of(caplog) if "gives different results" in text]


def test_small_differences_of_double_precision_are_no_rounding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        return loss_of(self, batch) * (1 + 1e-6 * len(batch[0]))

    fit(Net(step))
    assert any("gives different results" in text for text in warnings_of(caplog))


@pytest.mark.parametrize("is_mean", [True, False])
def test_steps_without_a_loss_in_evaluation_are_compared_with_their_draws(
    is_mean: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As detectors: random sizes in training, boxes instead of a loss in evaluation."""

    def step(self: Any, batch: Any) -> Tensor:
        if not self.training:
            return self(batch[0]).sum() * 0
        torch.rand(1)
        loss = loss_of(self, batch)
        return loss if is_mean else loss / (batch[1] == 0).sum()

    fit(Net(step))
    told = [text for text in warnings_of(caplog) if "gives different results" in text]
    assert len(told) == (0 if is_mean else 1)


def test_single_precision_within_double_is_rounding(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1]).double()

    fit(Net(step), parity="error")
    assert warnings_of(caplog) == []


def test_rounding_of_single_precision_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        loss = loss_of(self, batch)
        large = (batch[0] * 1e6).sum(1).mean()
        self.log("cancelled", large - (batch[0].sum(1) * 1e6).mean())
        return loss

    model = Net(step).float()
    fit(model, loader(X.float(), Y, size=16), parity="error")
    assert warnings_of(caplog) == []


# Nothing is left behind.


class Tracker:
    def __init__(self) -> None:
        self.values: list[int] = []
        self.sums = np.zeros(3)

    def update(self, value: int) -> None:
        self.values.append(value)
        self.sums += value


class Busy(Net):
    """Writes to whatever can be written to, in every step."""

    def __init__(self) -> None:
        super().__init__(loss_of)
        self.register_buffer("seen", torch.zeros(()))
        self.tracker = Tracker()
        self.total = torch.zeros(2)
        self.steps_by_size: dict[int, list[int]] = {}
        self.pair = (torch.zeros(1), [0])
        self.bound = self.tracker.update
        self.mean = MeanMetric()
        self.n = 0
        self.numbers = iter(range(1000))
        self.rows = iter(loader(size=1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        size = len(batch[0])
        self.n += size
        self.seen += size
        self.total.add_(size)
        self.tracker.update(size)
        self.bound(size)
        self.steps_by_size.setdefault(size, []).append(batch_idx)
        self.pair[0].add_(1)
        self.pair[1].append(size)
        self.mean(batch[0].mean())
        self.hparams.count = self.hparams.get("count", 0) + 1
        next(self.numbers)
        batch[0].mul_(2)
        self.net[0].bias.data.add_(0) if self.n < 0 else None
        self.log("mean", self.mean)
        torch.rand(1), np.random.rand(), random.random()


def state_of(model: Busy) -> Any:
    return (
        *(model.n, model.seen.item(), model.total.tolist(), model.tracker.values),
        *(model.tracker.sums.tolist(), model.steps_by_size, model.pair[0].item(), model.pair[1]),
        *(model.mean.update_count, dict(model.hparams), next(model.numbers)),
        *(torch.rand(1).item(), np.random.rand(), random.random()),
    )


def test_state_is_what_it_is_without_the_check() -> None:
    states = []
    for mode in ("off", "warn"):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        model = Busy()
        trainer = boring.trainer(DataParallelStrategy(parity_check=mode), 2)
        trainer.validate(model, loader(), verbose=False)
        states.append(state_of(model))
    assert states[0] == states[1]


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_run_is_bit_for_bit_what_it_is_without_the_check(precision: Any) -> None:
    weights = []
    for mode in ("off", "warn"):
        torch.manual_seed(0)
        model = Net(loss_of, validation_step=loss_of)
        model.net.insert(1, nn.BatchNorm1d(8, dtype=torch.float64))
        model.net.insert(2, nn.Dropout(0.5))
        shuffled = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
        fit(model, shuffled, parity=mode, precision=precision)
        weights.append((model, torch.rand(3)))
    boring.assert_same_weights(weights[0][0], weights[1][0], 0)
    assert torch.equal(weights[0][1], weights[1][1])


def test_batch_that_a_step_changes_is_not_changed_twice() -> None:
    def step(self: Any, batch: Any) -> Tensor:
        batch["x"].mul_(2)
        batch["ids"].append(len(batch["x"]))
        return loss_of(self, (batch["x"], batch["y"]))

    batches = []
    for mode in ("off", "error"):
        batches.append({"x": X[:8].clone(), "y": Y[:8], "ids": []})
        strategy = DataParallelStrategy(parity_check=mode)  # type: ignore[arg-type]
        model = Net(loss_of, test_step=step)
        boring.trainer(strategy, 2).test(model, DataLoader(batches[-1:], batch_size=None))
    assert torch.equal(batches[0]["x"], batches[1]["x"])
    assert batches[0]["ids"] == batches[1]["ids"]


ADDRESSES: set[int] = set()


def test_parameters_stay_as_they_are_where_the_trial_writes_to_them() -> None:
    def step(self: Any, batch: Any) -> Tensor:
        weight = self.net[0].weight
        ADDRESSES.add(weight.data_ptr())
        if weight.data_ptr() != real:
            weight.data.zero_()
        return loss_of(self, batch)

    ADDRESSES.clear()
    model = Net(step)
    real = model.net[0].weight.data_ptr()
    fit(model, max_steps=1)
    assert len(ADDRESSES) > 1
    assert real in ADDRESSES
    assert model.net[0].weight.abs().min() > 0


def test_iterator_that_cannot_be_copied_is_not_used_up(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        drawn.append(next(self.rows)[1].item())
        return class_weights(self, batch)

    drawn: list[int] = []
    model = Net(step)
    model.rows = iter(loader(size=1))
    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(model)
    assert sorted(drawn) == sorted(Y[:4].tolist())  # two steps on two replicas
    assert warnings_of(caplog) == []
    assert "`training_step` was not checked: it uses an iterator that cannot be copied" in str(
        [record.getMessage() for record in caplog.records]
    )


def test_loggers_hear_of_a_step_as_often_as_without_the_check(tmp_path: Path) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        self.logger.log_metrics({"called": 1.0})
        self.trainer.loggers[0].log_metrics({"called": 1.0})
        self.print("printed")
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return summed(self, batch)

    counts = []
    for mode in ("off", "warn"):
        logger = CSVLogger(tmp_path / mode)
        called = vars(logger)["log_metrics"] = _Count()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            fit(Net(step), parity=mode, logger=logger, log_every_n_steps=1)
        counts.append((called.count, printed.getvalue().count("printed")))
    assert counts[0] == counts[1]


def test_step_that_reads_its_optimizer_and_logger_is_checked(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        assert isinstance(self.trainer, pl.Trainer)
        self.logger.experiment.add_scalar("x", 1)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        self.trainer.should_stop = bool(self.lr_schedulers())
        return summed(self, batch)

    logger = CSVLogger(tmp_path)
    vars(logger)["_experiment"] = _Experiment()
    trainer = fit(Net(step), logger=logger)
    (text,) = warnings_of(caplog)
    assert "`loss`" in text
    assert trainer.global_step == 2


class _Count:
    count = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.count += 1


class _Experiment:
    def __getattr__(self, name: str) -> Any:
        return _nothing_at_all


def _nothing_at_all(*_: Any, **__: Any) -> None:
    pass


def test_step_that_steps_an_optimizer_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> None:
        loss = summed(self, batch)
        loss.backward()
        self.inner.step()

    model = Net(loss_of, test_step=step)
    model.inner = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    trainer = boring.trainer(DataParallelStrategy(), 2)
    with pytest.raises(RuntimeError), caplog.at_level(logging.INFO, logger=LOGGER):
        trainer.test(model, loader())
    assert all(map(torch.equal, before, model.parameters()))


def test_trial_that_fails_does_not_fail_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        if len(batch[0]) > 4:
            raise ValueError("not so many")
        return class_weights(self, batch)

    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(Net(step))
    assert warnings_of(caplog) == []
    assert "`training_step` was not checked: not so many" in caplog.messages


def test_out_of_memory_on_the_whole_batch_is_tried_with_fewer_samples(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def step(self: Any, batch: Any) -> Tensor:
        if len(batch[0]) > 4:
            raise torch.OutOfMemoryError("too large")
        return class_weights(self, batch)

    fit(Net(step))
    (text,) = warnings_of(caplog)
    assert "on 2 shards (of 2, 2 samples)" in text


def test_error_of_a_step_is_its_own() -> None:
    def step(self: Any, batch: Any) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fit(Net(step))


def test_gradients_needed_within_the_step_are_there(caplog: pytest.LogCaptureFixture) -> None:
    class Summed(parity_models.GradientPenalty):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * len(batch[0])

    fit(Summed())
    (text,) = warnings_of(caplog)
    assert "`loss`" in text


def test_manual_optimisation_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    def step(self: Any, batch: Any) -> None:
        loss = class_weights(self, batch)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()

    model = Net(step)
    model.automatic_optimization = False
    fit(model, parity="error")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"num_sanity_val_steps": 2}])
def test_short_runs_are_checked(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(class_weights, validation_step=lambda self, b: self.log("v", summed(self, b)))
    trainer = boring.trainer(DataParallelStrategy(), 2, **options)
    trainer.fit(model, loader(), loader())
    kinds = [
        text.split("`")[1] for text in warnings_of(caplog) if "gives different results" in text
    ]
    assert sorted(kinds) == ["training_step", "validation_step"]


def test_lr_finder_is_checked_and_tells_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trainer = boring.trainer(DataParallelStrategy(), 2, default_root_dir=tmp_path)
    model = Net(class_weights)
    Tuner(trainer).lr_find(model, loader(), num_training=4, update_attr=False)
    trainer.fit(model, loader())
    texts = [text for text in warnings_of(caplog) if "gives different results" in text]
    assert len(texts) == 1


def test_batch_of_one_sample_waits_for_a_larger_one(caplog: pytest.LogCaptureFixture) -> None:
    batches = [(X[:1], Y[:1]), (X[:8], Y[:8])]
    fit(Net(class_weights), DataLoader(batches, batch_size=None))
    (text,) = warnings_of(caplog)
    assert "(of 4, 4 samples)" in text


def test_compiled_modules_are_not_compiled_for_the_check() -> None:
    torch._dynamo.reset()
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.extend(len(x) for x in inputs if isinstance(x, Tensor) and x.ndim == 2)
        return graph.forward

    model = Net(loss_of)
    model.net = torch.compile(model.net, backend=backend)
    fit(model, loader(size=10), parity="error")
    # Not even the shards are sure to be compiled: with several threads, torch may let it be.
    assert 10 not in sizes
    torch._dynamo.reset()
    model.net(X[:10])
    torch._dynamo.reset()
    assert 10 in sizes


def test_padding_to_the_largest_of_a_shard_is_told_in_the_first_batch_that_has_some(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first batch has rows of one length, the second has a longer one."""
    lengths = [2] * 8 + [2] * 7 + [3]
    rows: Any = [X[index : index + length] for index, length in enumerate(lengths)]

    def padded(self: Any, batch: Any) -> Tensor:
        return self(nn.utils.rnn.pad_sequence(batch, batch_first=True).mean(1)).square().mean()

    fit(Net(padded), DataLoader(rows[:8], 8, collate_fn=list))
    assert not warnings_of(caplog)
    fit(Net(padded), DataLoader(rows, 8, collate_fn=list))
    (warning,) = warnings_of(caplog)
    assert "loss" in warning
