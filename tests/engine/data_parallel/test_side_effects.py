"""What a step leaves behind on the model under `dp`: as on one device, or told."""

import dataclasses
import types
from collections import Counter, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import numpy as np
import parity_models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mgpu.demo.data import Digits
from lightning_mgpu.demo.lenet import LeNet
from lightning_mgpu.demo.mlp import MLP
from lightning_mgpu.demo.resnet import ResNet
from lightning_mgpu.demo.transformer import Transformer

Step = Callable[[Any, Tensor, Tensor, Tensor], None]
Read = Callable[[Any], Any]

EVEN, UNEVEN = (8, 32), (5, 15)
"""Batch size and samples: shards of (4, 4), and of (3, 2) or (2, 2, 1)."""
ON = (("auto", 1), ("dp", 2))


class Meter:
    """An average as many projects have it."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def update(self, value: float, n: int = 1) -> None:
        self.sum += value * n
        self.count += n


@dataclasses.dataclass(slots=True)
class Slotted:
    n: int = 0
    values: list[int] = dataclasses.field(default_factory=list)


class Model(boring.Classifier):
    """A classifier that leaves something behind in each step."""

    classwide = 0

    def __init__(self, prepare: Callable[[Any], None], leave: Step) -> None:
        super().__init__()
        self.sub = nn.Module()
        prepare(self)
        self.leave = types.MethodType(lambda self, *args: leave(self, *args), self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.leave(x, y, logits, loss)
        return loss


def run(prepare: Any, leave: Step, data: tuple[int, int], strategy: Any, devices: int) -> Any:
    model = Model(prepare, leave)
    trainer = boring.trainer(strategy, devices, limit_val_batches=0)
    trainer.fit(model, boring.Blobs(*data))
    return model


def hits(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).sum()


def _set(**values: Any) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        for name, value in values.items():
            setattr(model, name, value() if callable(value) else value)

    return prepare


def _buffer(value: Any) -> Callable[[Any], None]:
    return lambda model: model.register_buffer("b", torch.as_tensor(value))


def _add_to(name: str, what: Any) -> Step:
    def leave(self: Any, x: Tensor, y: Tensor, logits: Tensor, loss: Tensor) -> None:
        setattr(self, name, getattr(self, name) + what(x, y, logits, loss))

    return leave


def _n(self: Any, x: Any, y: Any, *_: Any) -> None:
    self.n += len(y)


def _n_anew(self: Any, x: Any, y: Any, *_: Any) -> None:
    self.n = self.n + y.shape[0]


def _steps(self: Any, *_: Any) -> None:
    self.n += 1


def _steps_anew(self: Any, *_: Any) -> None:
    self.n = self.n + 1


def _loop(self: Any, x: Any, y: Any, *_: Any) -> None:
    for _ in y:
        self.n += 1


def _hits(self: Any, x: Any, y: Tensor, logits: Tensor, _: Any) -> None:
    self.n += int(hits(logits, y))


def _loss_sum(self: Any, x: Any, y: Any, logits: Any, loss: Tensor) -> None:
    self.n += loss.item()


def _loss_weighted(self: Any, x: Any, y: Any, logits: Any, loss: Tensor) -> None:
    self.n += loss.item() * len(y)


def _loss_tensor(self: Any, x: Any, y: Any, logits: Any, loss: Tensor) -> None:
    self.n += loss.detach()


def _last_loss(self: Any, x: Any, y: Any, logits: Any, loss: Tensor) -> None:
    self.n = loss.item()


def _annealed(self: Any, *_: Any) -> None:
    self.n = min(1.0, self.n + 0.25)


def _flag(self: Any, *_: Any) -> None:
    self.n = True
    self.mode = "train"


def _size_dict(self: Any, x: Any, y: Any, *_: Any) -> None:
    self.n["n"] += len(y)
    self.n["steps"] += 1


def _get_dict(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    for label in y.tolist():
        self.n[label] = self.n.get(label, 0) + 1


def _default(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    for label in y.tolist():
        self.n[label] += 1
    self.n["steps"] += 1


def _nested(self: Any, x: Any, y: Tensor, logits: Tensor, _: Any) -> None:
    self.n["train"]["n"] += len(y)
    self.n["train"]["list"][1] += int(hits(logits, y))
    self.n["steps"] = self.n["steps"] + 1


def _object(self: Any, x: Any, y: Tensor, logits: Tensor, loss: Tensor) -> None:
    self.n.update(loss.item(), len(y))


def _objects(self: Any, x: Any, y: Tensor, logits: Tensor, loss: Tensor) -> None:
    self.n["loss"].update(loss.item(), len(y))
    self.n["hits"].update(1.0, len(y))


def _slots(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.n.n += len(y)
    self.n.values.append(len(y))


def _namespace(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.n.seen += len(y)
    self.n.steps += 1


def _sub(self: Any, x: Any, y: Any, *_: Any) -> None:
    self.sub.n += len(y)


def _class(self: Any, x: Any, y: Any, *_: Any) -> None:
    self.classwide += len(y)


def _set_of(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.n.update(y.tolist())
    self.n.discard(-1)


def _removed(self: Any, *_: Any) -> None:
    self.n.pop("old", None)


def _tensor(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.n += len(y)


def _tensor_in_dict(self: Any, x: Any, y: Tensor, logits: Tensor, _: Any) -> None:
    self.n["hits"] += hits(logits, y)
    self.n["steps"] += 1


def _buffer_n(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.b += len(y)


def _buffer_steps(self: Any, *_: Any) -> None:
    self.b += 1


def _buffer_anew(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.b = self.b + len(y)


def _histogram(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.b += torch.bincount(y, minlength=3)


def _histogram_by_entry(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    for label in y:
        self.b[label] += 1


def _scattered(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.b.index_add_(0, y, torch.ones_like(y))


def _buffer_loss(self: Any, x: Any, y: Any, logits: Any, loss: Tensor) -> None:
    self.b.add_(loss.detach())


def _shape(self: Any, x: Tensor, *_: Any) -> None:
    self.n = x.shape[1:]


def _counted(self: Any, x: Any, y: Tensor, *_: Any) -> None:
    self.n.update(y.tolist())
    self.n["steps"] += 1


def _zero_then_tensor(self: Any, x: Any, y: Tensor, logits: Tensor, _: Any) -> None:
    self.n = self.n + hits(logits, y)


def _n_of(model: Any) -> Any:
    return model.n


AS_ON_ONE_DEVICE: dict[str, tuple[Any, Step, Read]] = {
    "samples": (_set(n=0), _n, _n_of),
    "samples, anew": (_set(n=3), _n_anew, _n_of),
    "samples, as float": (_set(n=0.0), _n, _n_of),
    "samples, one by one": (_set(n=0), _loop, _n_of),
    "steps": (_set(n=0), _steps, _n_of),
    "steps, anew": (_set(n=0), _steps_anew, _n_of),
    "hits": (_set(n=0), _hits, _n_of),
    "sum of losses": (_set(n=0.0), _loss_sum, _n_of),
    "weighted sum of losses": (_set(n=0.0), _loss_weighted, _n_of),
    "sum of losses as tensor": (_set(n=0), _loss_tensor, lambda m: float(m.n)),
    "last loss": (_set(n=0.0), _last_loss, _n_of),
    "last loss as tensor": (
        _set(n=None),
        lambda self, x, y, logits, loss: setattr(self, "n", loss.detach()),
        lambda m: float(m.n),
    ),
    "annealed": (_set(n=0.0), _annealed, _n_of),
    "flags": (_set(n=False, mode=""), _flag, lambda m: (m.n, m.mode)),
    "dict": (_set(n=lambda: {"n": 0, "steps": 0}), _size_dict, _n_of),
    "dict by get": (_set(n=dict), _get_dict, _n_of),
    "defaultdict": (_set(n=lambda: defaultdict(int)), _default, lambda m: dict(m.n)),
    "dict of a thousand classes": (
        _set(n=lambda: dict.fromkeys(range(2000), 0)),
        _get_dict,
        lambda m: {key: value for key, value in m.n.items() if value},
    ),
    "Counter": (_set(n=Counter), _counted, _n_of),
    "nested": (
        _set(n=lambda: {"train": {"n": 0, "list": [0, 0]}, "steps": 0}),
        _nested,
        _n_of,
    ),
    "UserDict": (_set(n=lambda: UserDict(n=0, steps=0)), _size_dict, lambda m: dict(m.n)),
    "object": (_set(n=Meter), _object, lambda m: vars(m.n)),
    "objects": (
        _set(n=lambda: {"loss": Meter(), "hits": Meter()}),
        _objects,
        lambda m: [vars(meter) for meter in m.n.values()],
    ),
    "slots": (_set(n=Slotted), _slots, lambda m: (m.n.n, sum(m.n.values))),
    "namespace": (
        _set(n=lambda: types.SimpleNamespace(seen=0, steps=0)),
        _namespace,
        lambda m: vars(m.n),
    ),
    "submodule": (lambda m: setattr(m.sub, "n", 0), _sub, lambda m: m.sub.n),
    "class attribute": (lambda m: None, _class, lambda m: m.classwide),
    "set": (_set(n=lambda: {-1}), _set_of, _n_of),
    "removed": (_set(n=lambda: {"old": 1, "new": 2}), _removed, _n_of),
    "tensor": (_set(n=lambda: torch.tensor(0)), _tensor, lambda m: int(m.n)),
    "tensor, anew": (_set(n=lambda: torch.tensor(0)), _n_anew, lambda m: int(m.n)),
    "number, then tensor": (_set(n=0), _zero_then_tensor, lambda m: int(m.n)),
    "tensors in a dict": (
        _set(n=lambda: {"hits": torch.tensor(0), "steps": torch.tensor(0)}),
        _tensor_in_dict,
        lambda m: {key: int(value) for key, value in m.n.items()},
    ),
    "buffer": (_buffer(0), _buffer_n, lambda m: int(m.b)),
    "float buffer": (_buffer(0.0), _buffer_n, lambda m: float(m.b)),
    "steps in a buffer": (_buffer(0), _buffer_steps, lambda m: int(m.b)),
    "buffer, anew": (_buffer(0), _buffer_anew, lambda m: int(m.b)),
    "histogram": (_buffer([0, 0, 0]), _histogram, lambda m: m.b.tolist()),
    "histogram by entry": (_buffer([0, 0, 0]), _histogram_by_entry, lambda m: m.b.tolist()),
    "histogram by index": (_buffer([0, 0, 0]), _scattered, lambda m: m.b.tolist()),
    "losses in a buffer": (
        lambda m: m.register_buffer("b", torch.zeros((), dtype=torch.float64)),
        _buffer_loss,
        lambda m: float(m.b),
    ),
    "shape of a sample": (_set(n=None), _shape, _n_of),
}


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [entry for key in sorted(value, key=str) for entry in (key, *_flatten(value[key]))]
    if isinstance(value, (list, tuple)):
        return [entry for part in value for entry in _flatten(part)]
    return [value]


@pytest.mark.parametrize(("data", "devices"), [(EVEN, 2), (UNEVEN, 2), (UNEVEN, 3)])
@pytest.mark.parametrize("name", AS_ON_ONE_DEVICE)
def test_what_steps_count_is_as_on_one_device(
    name: str, data: tuple[int, int], devices: int, caplog: pytest.LogCaptureFixture
) -> None:
    prepare, leave, read = AS_ON_ONE_DEVICE[name]
    alone = read(run(prepare, leave, data, "auto", 1))
    parallel = read(run(prepare, leave, data, "dp", devices))
    assert type(parallel) is type(alone)
    for a, b in zip(_flatten(parallel), _flatten(alone), strict=True):
        assert a == (pytest.approx(b, abs=1e-12) if isinstance(b, float) else b)
        assert type(a) is type(b)
    assert boring.told(caplog) == []


def _ema(self: Any, x: Tensor, *_: Any) -> None:
    self.n = 0.9 * self.n + 0.1 * x.mean().item()


def _maximum(self: Any, x: Tensor, *_: Any) -> None:
    self.n = max(self.n, x.max().item())


def _last_size(self: Any, x: Tensor, *_: Any) -> None:
    self.n = len(x)


def _whole_shape(self: Any, x: Tensor, *_: Any) -> None:
    self.n = x.shape


def _sum_of_something(self: Any, x: Tensor, *_: Any) -> None:
    self.n += x.mean().item()


def _ema_buffer(self: Any, x: Tensor, *_: Any) -> None:
    self.b.mul_(0.9).add_(0.1 * x.mean())


def _ema_buffer_anew(self: Any, x: Tensor, *_: Any) -> None:
    self.b = self.b * 0.9 + 0.1 * x.mean()


def _lerp_buffer(self: Any, x: Tensor, *_: Any) -> None:
    self.b.lerp_(x.mean(), 0.1)


def _queue(self: Any, x: Tensor, *_: Any) -> None:
    self.b = torch.cat([x[:, 0], self.b])[: len(self.b)]


def _registered(self: Any, x: Tensor, *_: Any) -> None:
    self.register_buffer("b", x.mean(0))


def _large(self: Any, x: Tensor, *_: Any) -> None:
    self.n[: len(x)] = x[0, 0]


def _features(self: Any, x: Tensor, y: Any, logits: Tensor, _: Any) -> None:
    self.n = logits.detach()


def _dict_entry(self: Any, x: Tensor, *_: Any) -> None:
    self.n["last"] = x.mean().item()


def _list_entry(self: Any, x: Tensor, *_: Any) -> None:
    self.n[0] = x.mean().item()


def _array(self: Any, x: Tensor, *_: Any) -> None:
    self.n[:] = x.mean(0).numpy()


def _object_value(self: Any, x: Tensor, *_: Any) -> None:
    self.n.sum = x.mean().item()


def _sometimes(self: Any, x: Tensor, y: Tensor, *_: Any) -> None:
    if y[0] == 0:
        self.n += 1


TOLD: dict[str, tuple[Any, Step, str]] = {
    "moving average": (_set(n=0.0), _ema, "Model.n"),
    "maximum": (_set(n=0.0), _maximum, "Model.n"),
    "last size": (_set(n=0), _last_size, "Model.n"),
    "whole shape": (_set(n=None), _whole_shape, "Model.n"),
    "sum of something": (_set(n=0.0), _sum_of_something, "Model.n"),
    "sometimes": (_set(n=0), _sometimes, "Model.n"),
    "moving average in a buffer": (_buffer(0.0), _ema_buffer, "b"),
    "moving average in a buffer, anew": (_buffer(0.0), _ema_buffer_anew, "b"),
    "moving average by lerp": (
        lambda m: m.register_buffer("b", torch.zeros((), dtype=torch.float64)),
        _lerp_buffer,
        "b",
    ),
    "moving average in a tensor": (
        _set(n=lambda: torch.tensor(0.0)),
        lambda self, x, *_: self.n.mul_(0.9).add_(x.mean()),
        "Model.n",
    ),
    "queue": (lambda m: m.register_buffer("b", torch.zeros(9).double()), _queue, "b"),
    "registered again": (_buffer([0.0] * 6), _registered, "b"),
    "large tensor": (_set(n=lambda: torch.zeros(400_000)), _large, "Model.n"),
    "features": (_set(n=None), _features, "Model.n"),
    "entry of a dict": (_set(n=dict), _dict_entry, "Model.n['last']"),
    "entry of a list": (_set(n=lambda: [0.0]), _list_entry, "Model.n[0]"),
    "array": (_set(n=lambda: np.zeros(6)), _array, "Model.n"),
    "value of an object": (_set(n=Meter), _object_value, "Model.n.sum"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_cannot_be_merged_is_told_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    prepare, leave, where = TOLD[name]
    run(prepare, leave, EVEN, "dp", 2)
    (message,) = boring.told(caplog)
    assert f"`{where}`" in message


DEMOS = {
    "mlp": lambda: MLP(hidden=[16]),
    "lenet": lambda: LeNet(l1=8, l2=8, channels=(4, 4)),
    "resnet": lambda: ResNet(width=4),
    "transformer": lambda: Transformer(dim=8, heads=2, layers=1),
}


@pytest.mark.parametrize("name", DEMOS)
def test_no_warning_on_demo_models(name: str, caplog: pytest.LogCaptureFixture) -> None:

    trainer = boring.trainer("dp", 2, limit_train_batches=4, limit_val_batches=2)
    model, data = DEMOS[name](), Digits(batch_size=16)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    assert boring.told(caplog) == []


class NormalisedByBatch(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


PARITY = (*parity_models.MODELS, *parity_models.UNPICKLABLE_MODELS, NormalisedByBatch)


@pytest.mark.parametrize("build", PARITY)
@pytest.mark.parametrize("devices", [2, 3])
def test_no_warning_on_models_of_the_parity_suite(
    build: type[pl.LightningModule], devices: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = boring.trainer("dp", devices)
    model = build()
    trainer.fit(model, boring.Blobs(10, 45))
    trainer.test(model, boring.Blobs(10, 45), verbose=False)
    assert boring.told(caplog) == []


def test_containers_of_unknown_parts_and_deques_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    def leave(self: Any, x: Tensor, y: Tensor, *_: Any) -> None:
        self.n.append(len(y))
        self.pair[1] += len(y)

    model = run(_set(n=lambda: deque(maxlen=4), pair=lambda: [object(), 0]), leave, EVEN, "dp", 2)
    assert (list(model.n), model.pair[1]) == ([4] * 4, 32)
    assert boring.told(caplog) == []


def test_lists_that_are_cleared_and_filled_again_hold_all_shards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def leave(self: Any, x: Tensor, y: Tensor, *_: Any) -> None:
        self.n.clear()
        self.n.extend(y.tolist())
        self.last.clear()

    models = [run(_set(n=list, last=lambda: [1]), leave, EVEN, *on) for on in ON]
    assert models[0].n == models[1].n
    assert models[1].last == []
    assert boring.told(caplog) == []


def test_addition_that_may_be_either_is_settled_by_a_later_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both replicas count one hit at first, which might have been a count of steps."""
    found = iter([(1, 1), (1, 1), (2, 0), (0, 0)])

    class Counting(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.hits = 0

        def on_train_batch_start(self, *_: Any) -> None:
            self.found = next(found)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first = bool((batch[0] == boring.blobs(32)[batch_idx * 8][0]).all(1).any())
            self.hits += self.found[0 if first else 1]
            return super().training_step(batch, batch_idx)

    model = Counting()
    boring.trainer("dp", 2, limit_val_batches=0).fit(model, boring.Blobs(*EVEN))
    assert model.hits == 6
    assert boring.told(caplog) == []


def test_addition_that_remains_undecided_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def leave(self: Any, *_: Any) -> None:
        self.n += self.amount

    run(_set(n=0, amount=3), leave, (8, 24), "dp", 2)
    (message,) = boring.told(caplog)
    assert "`Model.n`" in message
    assert "on_train_batch_end" in message


def test_counters_of_validation_under_inference_mode(caplog: pytest.LogCaptureFixture) -> None:
    class Validating(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0
            self.tensor = torch.tensor(0)
            self.register_buffer("seen", torch.tensor(0))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.n += len(batch[1])
            self.tensor = self.tensor + len(batch[1])
            self.seen += len(batch[1])

        def on_validation_epoch_start(self) -> None:
            self.n = 0
            self.tensor = torch.tensor(0)

    for data in (EVEN, UNEVEN):
        model = Validating()
        trainer = boring.trainer("dp", 2)
        for _ in range(2):
            trainer.validate(model, boring.Blobs(*data), verbose=False)
        assert (model.n, int(model.tensor), int(model.seen)) == (data[1], data[1], 2 * data[1])
    assert boring.told(caplog) == []


def test_numbers_are_plain_again_after_the_step() -> None:
    def leave(self: Any, x: Tensor, y: Tensor, *_: Any) -> None:
        self.n += len(y)
        self.kept.append(self.n)
        self.pairs.append((self.n, {"n": self.n}))

    model = run(_set(n=0, kept=list, pairs=list), leave, EVEN, "dp", 2)
    seen = [model.n, *model.kept, *_flatten(model.pairs)]
    assert {type(value) for value in seen} <= {int, str}
