"""What training with `dp` looks like to the user's code."""

import copy
import dataclasses
import pickle
import threading
from collections import Counter, UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_mgpu import DataParallelStrategy, Shard

# The check of the first batch calls its step, too.
UNCHECKED = partial(DataParallelStrategy, parity_check="off")


def dp(devices: int = 2, strategy: Any = "dp", **kwargs: Any) -> pl.Trainer:
    return boring.trainer(strategy, devices, **kwargs)


def both(
    build: Callable[[], pl.LightningModule],
    data: Any = None,
    devices: int = 2,
    strategy: Any = "dp",
    **kwargs: Any,
) -> tuple[pl.LightningModule, pl.LightningModule, pl.Trainer, pl.Trainer]:
    """Train one model on one device and another with `dp`."""
    alone, parallel = build(), build()
    kwargs = {"max_epochs": 2, **kwargs}
    trainers = boring.trainer("auto", 1, **kwargs), dp(devices, strategy, **copy.deepcopy(kwargs))
    for trainer, model in zip(trainers, (alone, parallel), strict=True):
        trainer.fit(model, data or boring.Blobs(10, 48))
    return alone, parallel, *trainers


class Listing(Dataset[Any]):
    """Samples made by a function of their index."""

    def __init__(self, make: Callable[[int], Any], size: int) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def loader(make: Callable[[int], Any], size: int = 8, batch_size: int = 4, **kw: Any) -> Any:
    return DataLoader(Listing(make, size), batch_size=batch_size, **kw)


# Steps and shards


def test_each_replica_runs_once_on_its_own_thread_and_shard() -> None:
    seen: list[tuple[int, str, int]] = []
    barrier = threading.Barrier(2, timeout=60)

    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            barrier.wait()  # passes only if both are here at once
            seen.append((batch_idx, threading.current_thread().name, len(batch[0])))
            return super().training_step(batch, batch_idx)

    dp(strategy=UNCHECKED()).fit(Model(), boring.Blobs(8, 16))
    assert sorted(seen) == [
        (index, f"mgpu-worker-{slot}", 4) for index in range(2) for slot in range(2)
    ]


def test_loss_is_weighted_by_shard_size() -> None:
    losses: list[Tensor] = []

    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).mean() * 0 + len(batch[0])

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"])

    dp(devices=3).fit(Model(), boring.Blobs(7, 7))
    assert [loss.item() for loss in losses] == pytest.approx([(3 * 3 + 2 * 2 + 2 * 2) / 7])


def test_outputs_are_joined_and_averaged() -> None:
    outputs: list[Any] = []

    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return {
                "loss": self._loss(batch),
                "labels": y,
                "nested": [x.sum(1), {"scalar": y.double().mean()}],
                "integer": torch.tensor(len(y)),
                "number": float(len(y)),
                "same": 3,
                "text": "first",
                "texts": [str(int(label)) for label in y],
            }

        def on_train_batch_end(self, output: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(output)
            assert len(batch[0]) == 5

    dp().fit(Model(), boring.Blobs(5, 5))
    (output,) = outputs
    x, y = boring.blobs(5).tensors
    assert torch.equal(output["labels"], y)
    assert torch.equal(output["nested"][0], x.sum(1))
    assert output["nested"][1]["scalar"].item() == pytest.approx(y.double().mean().item())
    assert output["integer"].item() == 5  # whole numbers are counts
    assert output["number"] == pytest.approx(2.6)
    assert (output["same"], output["text"]) == (3, "first")
    assert output["texts"] == [str(int(label)) for label in y]
    assert not output["nested"][0].requires_grad


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_predict_returns_in_order(devices: int, batch_size: int) -> None:
    data = boring.Blobs(batch_size, 7)
    model = boring.Classifier()
    predictions = dp(devices).predict(model, datamodule=data)
    assert predictions is not None
    assert [len(batch) for batch in predictions] == [len(x) for x, _ in data.predict_dataloader()]
    expected = model(boring.blobs(7).tensors[0])
    torch.testing.assert_close(torch.cat(predictions), expected.detach())


def test_step_that_returns_nothing_is_skipped() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)


def test_replicas_without_a_loss_weigh_nothing() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if (batch[1][0] == 0) else None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, expected = Model(), boring.Classifier()
    dp().fit(model, boring.Blobs(4, 4))  # labels 0 1 | 2 0
    loss = expected._loss([tensor[:2] for tensor in boring.blobs(4).tensors])
    loss.backward()
    for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual.data, parameter.data - 0.1 * parameter.grad)


# Batches


@dataclasses.dataclass
class Sample:
    x: Any
    y: Any
    note: Any = None


class Pair(NamedTuple):
    x: Any
    y: Any


class Unwrapping(boring.Classifier):
    """Takes its batch apart by a function; counts what it has seen in `shards`."""

    def __init__(self, unwrap: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unwrap = unwrap
        self.shards: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shards.append(batch)
        return self._loss(self.unwrap(batch))


def _sample(index: int) -> tuple[Tensor, Tensor]:
    return boring.blobs(8)[index]


BATCHES: dict[str, tuple[Callable[[int], Any], Any, Callable[[Any], Any]]] = {
    "dict": (lambda i: dict(zip("xy", _sample(i), strict=True)), None, lambda b: (b["x"], b["y"])),
    "named tuple": (lambda i: Pair(*_sample(i)), None, lambda b: (b.x, b.y)),
    "dataclass": (
        _sample,
        lambda samples: Sample(*map(torch.stack, zip(*samples, strict=True)), note="all"),
        lambda b: (b.x, b.y),
    ),
    "mapping": (
        _sample,
        lambda samples: UserDict(
            zip("xy", map(torch.stack, zip(*samples, strict=True)), strict=True)
        ),
        lambda b: (b["x"], b["y"]),
    ),
    "strings": (
        lambda i: {"x": _sample(i)[0], "y": _sample(i)[1], "name": f"sample {i}"},
        None,
        lambda b: (b["x"][: len(b["name"])], b["y"]),
    ),
    "plain leaves": (
        _sample,
        lambda samples: [*map(torch.stack, zip(*samples, strict=True)), 0.5, None, (9,) * 4],
        lambda b: (b[0], b[1]),
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_structure(kind: str) -> None:
    make, collate, unwrap = BATCHES[kind]
    data = loader(make, collate_fn=collate)
    alone, parallel, *_ = both(lambda: Unwrapping(unwrap), data)
    boring.assert_same_weights(alone, parallel)
    assert isinstance(parallel, Unwrapping)
    assert {type(shard) for shard in parallel.shards} == {type(next(iter(data)))}
    assert len(parallel.shards) == 2 * 2 * 2  # epochs, batches, replicas
    if kind == "strings":
        assert [shard["name"] for shard in parallel.shards[:2]] == [
            ["sample 0", "sample 1"],
            ["sample 2", "sample 3"],
        ]


def test_tensors_of_different_lengths_are_named() -> None:
    data = loader(
        _sample,
        collate_fn=lambda samples: {
            "image": torch.stack([x for x, _ in samples]),
            "boxes": [torch.zeros(3, 4)],
        },
    )
    with pytest.raises(ValueError, match=r"`batch\['image'\]` has 4.*`batch\['boxes'\]\[0\]`"):
        dp().fit(Unwrapping(lambda b: b), data)


def test_scatter_fn_splits_what_we_cannot() -> None:
    def collate(samples: Any) -> Any:
        return {"samples": samples, "table": torch.zeros(7, 2)}

    def scatter(batch: Any, count: int) -> list[Shard]:
        halves = batch["samples"][:1], batch["samples"][1:]
        return [Shard({**batch, "samples": half}, len(half)) for half in halves]

    def unwrap(batch: Any) -> Any:
        return tuple(map(torch.stack, zip(*batch["samples"], strict=True)))

    data = loader(_sample, collate_fn=collate)
    strategy = DataParallelStrategy(scatter_fn=scatter)
    alone, parallel, *_ = both(lambda: Unwrapping(unwrap), data, strategy=strategy)
    boring.assert_same_weights(alone, parallel)


def test_scatter_fn_with_too_many_shards_is_refused() -> None:
    strategy = DataParallelStrategy(scatter_fn=lambda batch, n: [Shard(batch, 1)] * (n + 1))
    with pytest.raises(ValueError, match="`scatter_fn` made 3 shards for 2 devices"):
        dp(strategy=strategy).fit(boring.Classifier(), boring.Blobs())


def test_scatter_fn_that_returns_something_else_is_refused() -> None:
    strategy = DataParallelStrategy(scatter_fn=lambda batch, n: [batch, batch])
    with pytest.raises(TypeError, match=r"`lightning_mgpu.Shard\(batch, size\)`.*\['list'\]"):
        dp(strategy=strategy).fit(boring.Classifier(), boring.Blobs())


def test_gather_fn_puts_outputs_together() -> None:
    class Model(boring.Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.zeros(len(batch[0]), int(batch[1].sum()) + 1)

    data = boring.Blobs(5, 5)
    with pytest.raises(ValueError, match=r"`output` has shapes .*gather_fn"):
        dp().predict(Model(), datamodule=data)
    strategy = DataParallelStrategy(gather_fn=lambda outputs, sizes: (len(outputs), sizes))
    assert dp(strategy=strategy).predict(Model(), datamodule=data) == [(2, [3, 2])]


def test_transfer_hooks_see_shards_and_the_hook_before_sees_the_whole_batch() -> None:
    calls: list[tuple[str, int]] = []

    class Model(boring.Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(("before", len(batch[0])))
            return batch

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            calls.append(("transfer", len(batch[0])))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(("after", len(batch[0])))
            return [batch[0] * 0, batch[1]]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert not batch[0].any()
            return super().training_step(batch, batch_idx)

    dp(strategy=UNCHECKED(), limit_val_batches=0).fit(Model(), boring.Blobs(4, 4))
    assert sorted(calls) == [
        *[("after", 2)] * 2,
        ("before", 4),
        *[("transfer", 2)] * 2,
    ]


def test_several_dataloaders() -> None:
    class Model(boring.Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self._loss(batch) + dataloader_idx)

    class Data(boring.Blobs):
        def val_dataloader(self) -> Any:
            return [self._dataloader(), self._dataloader()]

    *_, one, two = both(Model, Data(10, 25))
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= set(two.callback_metrics)
    torch.testing.assert_close(dict(two.callback_metrics), dict(one.callback_metrics))


# Models


class Normalised(boring.Classifier):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8, momentum=momentum)
        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0  # the same weights at every step


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("devices", [2, 3])
def test_batch_norm_statistics_are_those_of_the_whole_batch(
    momentum: float | None, devices: int
) -> None:
    data = boring.Blobs(10, 25)
    alone, parallel, *_ = both(lambda: Normalised(momentum), data, devices)
    boring.assert_same_weights(alone, parallel)


def test_batch_norm_statistics_of_the_first_shard() -> None:
    model, expected = Normalised(), Normalised()
    strategy = DataParallelStrategy(batch_norm="first")
    dp(strategy=strategy, limit_val_batches=0).fit(model, boring.Blobs(10, 10))
    expected(boring.blobs(10).tensors[0][:5])
    boring.assert_same_weights(expected, model)


def test_batch_norm_gets_no_shard_of_one_sample() -> None:
    dp(devices=3).fit(Normalised(), boring.Blobs(4, 4 + 3))


def test_unknown_batch_norm_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_norm='all'.*use 'merge'"):
        DataParallelStrategy(batch_norm="all")  # type: ignore[arg-type]


class Dropping(boring.Classifier):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__("adam")
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        ).double()
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.net(x)
        return self.net[3:](checkpoint(self.net[:3], x, use_reentrant=False))


def _train_dropping(recompute: bool = False, seed: int = 1, devices: int = 2) -> nn.Module:
    model = Dropping(recompute)
    pl.seed_everything(seed, verbose=False)
    dp(devices, max_epochs=3).fit(model, boring.Blobs(10, 48))
    return model


@pytest.fixture
def no_seed_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # and so forgotten again


@pytest.mark.usefixtures("no_seed_in_environment")
def test_dropout_repeats_bit_for_bit_under_the_same_seed() -> None:
    first = _train_dropping()
    for _ in range(2):
        boring.assert_same_weights(first, _train_dropping(), tolerance=0)
    with pytest.raises(AssertionError):
        boring.assert_same_weights(first, _train_dropping(seed=2), tolerance=1e-6)


@pytest.mark.usefixtures("no_seed_in_environment")
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_activation_checkpointing_draws_the_same_masks_again(devices: int) -> None:
    kept = _train_dropping(recompute=False, devices=devices)
    recomputed = _train_dropping(recompute=True, devices=devices)
    boring.assert_same_weights(kept, recomputed)


@pytest.mark.usefixtures("no_seed_in_environment")
def test_random_numbers_of_a_later_step_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                torch.rand(1)
            return super().training_step(batch, batch_idx)

    dp().fit(Model(), boring.Blobs())
    assert "training_step drew random numbers for the first time" in caplog.text


def test_shuffled_data_comes_in_the_order_of_one_device() -> None:
    class Data(boring.Blobs):
        def train_dataloader(self) -> Any:
            return DataLoader(boring.blobs(48), batch_size=10, shuffle=True)

    def build() -> pl.LightningModule:
        torch.manual_seed(3)
        return boring.Classifier()

    alone, parallel = build(), build()
    for trainer, model in ((boring.trainer("auto", 1), alone), (dp(), parallel)):
        torch.manual_seed(5)
        trainer.fit(model, Data())
    boring.assert_same_weights(alone, parallel)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_submodules(backend: str) -> None:
    def build() -> pl.LightningModule:
        model = boring.Classifier()
        model.net = torch.compile(model.net, backend=backend)  # type: ignore[assignment]
        return model

    alone, parallel, *_ = both(build)
    boring.assert_same_weights(alone, parallel)


def test_hooks_of_modules_act_on_the_replica_they_are_called_on() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.net[2].register_forward_hook(self._scaled)
            self.layers = [self.net[0], (self.net[1], self.net[2])]
            self.apply_first = self.net[0].forward

        def _scaled(self, module: Any, args: Any, output: Tensor) -> Tensor:
            return output * self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1][1](self.layers[1][0](self.apply_first(x)))

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)
    assert isinstance(alone, Model)
    assert not torch.equal(alone.scale, torch.ones(3, dtype=torch.float64))


def test_gradient_hooks_fire_once_with_the_whole_gradient() -> None:
    gradients: dict[str, list[Tensor]] = {"alone": [], "parallel": []}

    def build(name: str) -> pl.LightningModule:
        model = boring.Classifier()
        weight = model.net[0].weight
        weight.register_hook(lambda gradient: gradients[name].append(gradient.clone()))
        weight.register_post_accumulate_grad_hook(
            lambda parameter: gradients[name].append(parameter.grad.clone())
        )
        return model

    boring.trainer("auto", 1).fit(build("alone"), boring.Blobs())
    dp().fit(build("parallel"), boring.Blobs())
    assert len(gradients["alone"]) == 2 * 12
    torch.testing.assert_close(gradients["parallel"], gradients["alone"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "16-true"])
def test_precisions(precision: Any) -> None:
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = self.net.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            dtypes.add((logits.dtype, torch.zeros(1).dtype))
            return nn.functional.cross_entropy(logits.float(), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    data = loader(lambda i: (boring.blobs(8)[i][0].float(), boring.blobs(8)[i][1]))
    alone, parallel, *_ = both(Model, data, precision=precision)
    expected = torch.float64 if precision == "64-true" else torch.bfloat16
    if precision == "16-true":
        expected = torch.float16
    assert dtypes == {(expected, torch.float32 if "mixed" in precision else expected)}
    boring.assert_same_weights(alone, parallel, tolerance=1e-9 if precision == "64-true" else 2e-2)


# What the master's hooks and the replicas' steps change


def test_freezing_in_the_middle_of_training() -> None:
    class Model(boring.Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch % 2 == 0)

    alone, parallel, *_ = both(Model, max_epochs=4)
    boring.assert_same_weights(alone, parallel)


def test_module_replaced_in_the_middle_of_training() -> None:
    class Model(boring.Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with torch.no_grad():
                    fresh = nn.Linear(8, 3).double()
                    for parameter in fresh.parameters():
                        parameter.fill_(0.1)
                self.net[2] = fresh

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)


def test_parameter_storage_swapped_in_the_middle_of_training() -> None:
    class Model(boring.Classifier):
        def on_train_epoch_start(self) -> None:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone() * 0.5

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ],
    ids=["ema", "swa"],
)
def test_weight_averaging(callback: Callable[[], pl.Callback]) -> None:
    alone, parallel, *_ = both(boring.Classifier, callbacks=[callback()], max_epochs=3)
    boring.assert_same_weights(alone, parallel)


class Keeping(boring.Classifier):
    """Keeps what its steps produce, in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0
        self.firsts: list[int] = []
        self.by_name: dict[str, list[int]] = {"y": []}
        self.seen: set[int] = set()
        self.epochs: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counter += 1
        self.firsts.append(int(batch[1][0]))
        self.by_name["y"].append(len(batch[1]))
        self.by_name.setdefault("new", []).append(batch_idx)
        self.seen.update(batch[1].tolist())
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.epochs.append(list(self.firsts))
        self.firsts = []


def test_attributes_and_containers_written_in_steps(caplog: pytest.LogCaptureFixture) -> None:
    model = Keeping()
    dp(max_epochs=2, limit_val_batches=0).fit(model, boring.Blobs(5, 10))
    # Labels 0 1 2 0 1 | 2 0 1 2 0, in shards of three and two.
    assert model.counter == 4
    assert model.epochs == [[0, 0, 2, 2]] * 2
    assert model.by_name == {"y": [3, 2] * 4, "new": [0, 0, 1, 1] * 2}
    assert model.seen == {0, 1, 2}
    assert "is kept" not in caplog.text


def test_attributes_that_differ_between_replicas_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Model(boring.Classifier):
        last = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.last = len(batch[0])
            return super().training_step(batch, batch_idx)

    model = Model()
    dp(limit_val_batches=0).fit(model, boring.Blobs(5, 10))
    assert model.last == 3
    assert caplog.text.count("a different value to `Model.last` on each replica") == 1


def test_containers_and_buffers_that_count_are_as_on_one_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.counts = {"seen": 0}
            self.labels: Counter[int] = Counter()
            self.register_buffer("total", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.counts["seen"] += len(batch[0])
            self.labels.update(batch[1].tolist())
            self.total += len(batch[0])
            return super().training_step(batch, batch_idx)

    model = Model()
    dp(limit_val_batches=0).fit(model, boring.Blobs(5, 10))
    assert model.labels == {0: 4, 1: 3, 2: 3}
    assert (model.counts, model.total.item()) == ({"seen": 10}, 10)
    assert "is kept" not in caplog.text


def test_freezing_within_a_step() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                self.net[0].requires_grad_(False)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)


def test_functions_that_close_over_the_model_act_on_the_replica() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.features: list[Tensor] = []
            found: dict[str, Tensor] = {}
            self.net[0].register_forward_hook(lambda m, i, o: self.features.append(o))
            self.net[1].register_forward_hook(lambda m, i, o: found.update(last=o))
            self.look = lambda: found.pop("last")
            self.run = lambda x: self.net(x)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.run(x)
            return logits + self.features.pop().sum() * 0.1 + self.look().mean()

    alone, parallel, *_ = both(Model)
    boring.assert_same_weights(alone, parallel)


def test_modules_reached_through_hyperparameters() -> None:
    class Model(boring.Classifier):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.hparams["backbone"](x))

    def build() -> pl.LightningModule:
        torch.manual_seed(0)
        return Model(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double())

    with pytest.warns(UserWarning, match="is an instance of `nn.Module`"):
        alone, parallel, *_ = both(build, max_epochs=1, limit_train_batches=1)
    counts = [m.backbone[1].num_batches_tracked for m in (alone, parallel)]  # type: ignore[index, union-attr]
    assert counts == [1, 1]


def test_attributes_set_between_steps_are_seen_by_all_replicas() -> None:
    seen: list[tuple[int, float]] = []

    class Model(boring.Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.temperature = batch_idx * 0.5

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((batch_idx, self.temperature))
            return super().training_step(batch, batch_idx)

    dp(strategy=UNCHECKED(), limit_val_batches=0).fit(Model(), boring.Blobs(4, 8))
    assert sorted(seen) == [(0, 0.0), (0, 0.0), (1, 0.5), (1, 0.5)]


def test_buffers_that_are_added_to_count_all_replicas() -> None:
    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros((), dtype=torch.float64))
            self.register_buffer("steps", torch.tensor(0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.total += batch[0].shape[0]
            self.steps = self.steps + 1
            return super().training_step(batch, batch_idx)

    model = Model()
    dp(limit_val_batches=0).fit(model, boring.Blobs(5, 10))
    assert (model.total.item(), model.steps.item()) == (10, 2)


# Around training


def test_early_stopping_and_checkpoint_on_logged_metrics(tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [
            EarlyStopping("val_loss", patience=1, min_delta=0.05),
            ModelCheckpoint(tmp_path, monitor="val_loss"),
        ]

    *_, one, two = both(
        boring.Classifier, callbacks=callbacks(), max_epochs=30, enable_checkpointing=True
    )
    assert 1 < two.current_epoch == one.current_epoch < 30
    first, second = one.checkpoint_callback, two.checkpoint_callback
    assert isinstance(first, ModelCheckpoint)
    assert isinstance(second, ModelCheckpoint)
    torch.testing.assert_close(second.best_model_score, first.best_model_score)


@pytest.mark.parametrize(("first", "second"), [("dp", "auto"), ("auto", "dp"), ("dp", "dp")])
def test_resume_is_exact_in_either_direction(first: str, second: str, tmp_path: Path) -> None:
    def train(strategy: str, model: pl.LightningModule, epochs: int, resume: Any = None) -> Any:
        devices = 1 if strategy == "auto" else 2
        trainer = boring.trainer(strategy, devices, max_epochs=epochs)
        trainer.fit(model, boring.Blobs(10, 48), ckpt_path=resume)
        return trainer

    whole, part = boring.Classifier("adam", True), boring.Classifier("adam", True)
    train("auto", whole, 4)
    train(first, part, 2).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    resumed = boring.Classifier("adam", True)
    train(second, resumed, 4, tmp_path / "half.ckpt")
    boring.assert_same_weights(whole, resumed)


def test_fit_again_with_the_same_trainer_strategy_and_module() -> None:
    strategy = DataParallelStrategy()
    alone, parallel = boring.Classifier(), boring.Classifier()
    one, two = boring.trainer("auto", 1), dp(strategy=strategy)
    for trainer, model in ((one, alone), (two, parallel)):
        for _ in range(2):
            trainer.fit(model, boring.Blobs())
            trainer.fit_loop.max_epochs += 1
        trainer.test(model, boring.Blobs(), verbose=False)
    boring.assert_same_weights(alone, parallel)
    dp(strategy=strategy).fit(boring.Classifier(), boring.Blobs())
    torch.testing.assert_close(dict(two.callback_metrics), dict(one.callback_metrics))


def test_module_is_as_it_was_after_training() -> None:
    one, model = boring.Classifier(), boring.Classifier()
    parameters = dict(model.named_parameters())
    boring.trainer("auto", 1).fit(one, boring.Blobs())
    dp().fit(model, boring.Blobs())
    for (name, module), other in zip(model.named_modules(), one.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys(), name
        assert not module._forward_hooks
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_copies_and_pickles_in_the_middle_of_training() -> None:
    copies: list[Any] = []

    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copies.append((copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))))

    model = boring.Classifier()
    dp(callbacks=[Copying()]).fit(model, boring.Blobs())
    for copied in copies[-1]:
        boring.assert_same_weights(model, copied)
        dp().fit(copied, boring.Blobs())


def test_trainer_is_pickled() -> None:
    trainer = dp(strategy=DataParallelStrategy(batch_norm="first"))
    trainer.validate(boring.Classifier(), boring.Blobs(), verbose=False)
    other = pickle.loads(pickle.dumps(trainer))
    alone, parallel = boring.Classifier(), boring.Classifier()
    boring.trainer("auto", 1).fit(alone, boring.Blobs())
    other.fit(parallel, boring.Blobs())
    boring.assert_same_weights(alone, parallel)


def test_one_device_works_too() -> None:
    alone, parallel, *_ = both(boring.Classifier, devices=1)
    boring.assert_same_weights(alone, parallel)


def test_detect_anomaly_and_overfit_batches() -> None:
    alone, parallel, *_ = both(boring.Classifier, detect_anomaly=True, overfit_batches=2)
    boring.assert_same_weights(alone, parallel)


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_profilers(profiler: str, tmp_path: Path) -> None:
    # A profiler of Python's sees every turn of the interpreter, also that of a leftover signal.
    trainer = dp(profiler=profiler, default_root_dir=tmp_path)
    trainer.fit(boring.Classifier(), boring.Blobs())
    assert trainer.state.finished


def test_callers_threads_are_its_own_again() -> None:
    counts: list[int] = []

    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            counts.append(torch.get_num_threads())
            return super().training_step(batch, batch_idx)

    before = torch.get_num_threads()
    dp(devices=2).fit(Model(), boring.Blobs())
    assert torch.get_num_threads() == before
    assert len(set(counts)) == 1
