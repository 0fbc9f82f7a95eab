"""Batches and outputs as people write them: under `dp` they give what one device gives."""

import dataclasses
from collections import UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boring
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_mgpu import DataParallelStrategy, Shard, gather, scatter

SIZE = 8
X, Y = boring.blobs(SIZE).tensors


class Sample(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        self.n = len(self.x)


class Encoding(UserDict[str, Any]):
    """Like what tokenizers of Hugging Face return."""

    def to(self, device: torch.device) -> "Encoding":
        return Encoding({key: value.to(device) for key, value in self.data.items()})


class Model(boring.Classifier):
    """A step made of a function of the logits' module and the batch."""

    def __init__(self, step: Callable[[Callable[[Tensor], Tensor], Any], Any]) -> None:
        super().__init__()
        self.step = step
        self.returned: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(self.net, batch)
        self.log("loss", loss, batch_size=SIZE)
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.net, batch)


def _loader(collate: Callable[[list[int]], Any], batch: int = SIZE) -> DataLoader[Any]:
    return DataLoader(range(SIZE), batch, collate_fn=collate)  # type: ignore[arg-type]


def _one_by_one(net: Any, xs: Any, ys: Any) -> Tensor:
    losses = [F.cross_entropy(net(x[None]), y[None]) for x, y in zip(xs, ys, strict=True)]
    return torch.stack(losses).mean()


def _columns(rows: list[Any]) -> Any:
    return tuple(zip(*rows, strict=True))


TRAINING: dict[str, tuple[Callable[[list[int]], Any], Callable[[Any, Any], Any]]] = {
    "labels in a list": (
        lambda ids: {"x": X[ids], "labels": [int(Y[i]) for i in ids]},
        lambda net, b: F.cross_entropy(net(b["x"]), torch.tensor(b["labels"])),
    ),
    "several labels each": (
        lambda ids: (X[ids], [list(range(i % 3 + 1)) for i in ids]),
        lambda net, b: (
            torch.stack([-o[t].mean() for o, t in zip(net(b[0]), b[1], strict=True)]).exp().mean()
        ),
    ),
    "targets as dicts, by chance as long as the batch": (
        lambda ids: (X[ids], [{"boxes": X[:SIZE, :3] + i} for i in ids]),
        lambda net, b: torch.stack(
            [(o - t["boxes"].mean(0)).square().sum() for o, t in zip(net(b[0]), b[1], strict=True)]
        ).mean(),
    ),
    "a list of samples": (
        lambda ids: [(X[i], Y[i]) for i in ids],
        lambda net, b: _one_by_one(net, *_columns(b)),
    ),
    "a list of dicts": (
        lambda ids: [{"x": X[i], "y": Y[i], "id": f"id{i}"} for i in ids],
        lambda net, b: _one_by_one(net, [s["x"] for s in b], [s["y"] for s in b]),
    ),
    "images of different sizes, and their targets": (
        lambda ids: _columns([(X[i].repeat(i % 3 + 1, 1), {"y": Y[i]}) for i in ids]),
        lambda net, b: _one_by_one(net, [x.mean(0) for x in b[0]], [t["y"] for t in b[1]]),
    ),
    "arrays": (
        lambda ids: {"x": X[ids].numpy(), "y": Y[ids].numpy(), "ids": np.array(ids)},
        lambda net, b: F.cross_entropy(net(torch.as_tensor(b["x"])), torch.as_tensor(b["y"])),
    ),
    "a dataclass that counts its samples": (
        lambda ids: Record(X[ids], Y[ids]),
        lambda net, b: F.cross_entropy(net(b.x), b.y, reduction="sum") / b.n,
    ),
    "a tokenizer's dict": (
        lambda ids: Encoding({"x": X[ids], "y": Y[ids]}),
        lambda net, b: F.cross_entropy(net(b["x"]), b["y"]),
    ),
    "named tuples and paths": (
        lambda ids: (Sample(X[ids], Y[ids]), tuple(Path(f"{i}") for i in ids), None),
        lambda net, b: F.cross_entropy(net(b[0].x), b[0].y) * (len(b[1]) / len(b[0].y)),
    ),
}


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("kind", TRAINING)
def test_training_equals_one_device(kind: str, devices: int) -> None:
    collate, step = TRAINING[kind]
    models = [Model(step), Model(step)]
    trainers = [boring.trainer("auto", 1), boring.trainer("dp", devices)]
    for model, trainer in zip(models, trainers, strict=True):
        trainer.fit(model, _loader(collate))
    one, many = (trainer.callback_metrics["loss"] for trainer in trainers)
    assert many.item() == pytest.approx(one.item(), abs=1e-9)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


OUTPUTS: dict[str, Callable[[Any, Any], Any]] = {
    "names": lambda net, b: b[1],
    "logits and names": lambda net, b: {"logits": net(b[0]), "name": list(b[1])},
    "floats": lambda net, b: tuple(net(b[0])[:, 0].tolist()),
    "a float or nothing": lambda net, b: [v.item() if v > 0 else None for v in net(b[0])[:, 0]],
    "entries of an axis": lambda net, b: net(b[0]).unbind(),
    "no detections": lambda net, b: [[] for _ in b[1]],
    "as many rows as a shard has samples": lambda net, b: [o.repeat(4, 1) for o in net(b[0])],
    "detections": lambda net, b: [
        {"boxes": o.repeat(int(n[2:]) % 3, 1), "label": n}
        for o, n in zip(net(b[0]), b[1], strict=True)
    ],
    "by name": lambda net, b: dict(zip(b[1], net(b[0]), strict=True)),
    "logits and labels": lambda net, b: (net(b[0]), net(b[0]).argmax(1)),
    "states": lambda net, b: torch.stack([net(b[0])] * 2),
    "tokens": lambda net, b: net(b[0]).reshape(-1),
    "a count": lambda net, b: {"n": len(b[1])},
    "kept": lambda net, b: [n for n in b[1] if n == "none of them"],
}


@pytest.mark.parametrize("batch", [SIZE, 5])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_predictions_equal_one_device(kind: str, batch: int) -> None:
    def run(strategy: str, devices: int) -> Any:
        loader = DataLoader([(x, f"id{i}") for i, x in enumerate(X)], batch)
        return boring.trainer(strategy, devices).predict(Model(OUTPUTS[kind]), loader)

    assert _plain(run("dp", 2)) == _plain(run("auto", 1))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value)
    if isinstance(value, Tensor):
        return value.double().numpy().round(9).tolist()
    return round(value, 9) if isinstance(value, float) else value


def test_sequence_first_batches_are_split_along_a_dimension() -> None:
    class Recurrent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.GRU(6, 3).double()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            states, last = self.rnn(batch[0])
            return F.cross_entropy(last[0], batch[1]) + states.square().mean()

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.rnn(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def collate(ids: list[int]) -> Any:
        return torch.stack([X[ids]] * 5), Y[ids]

    strategy = DataParallelStrategy(
        scatter_fn=partial(scatter, dim=1), gather_fn=partial(gather, dim=1)
    )
    results = []
    for trainer in (boring.trainer("auto", 1), boring.trainer(strategy, 2)):
        model = Recurrent()
        trainer.fit(model, _loader(collate))
        results.append((trainer.predict(model, _loader(collate))[0], model))
    (one, first), (many, second) = results
    torch.testing.assert_close(many, one, rtol=0, atol=1e-9)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("devices", [2, 3])
def test_shards_may_weigh_by_tokens_and_outputs_have_a_row_per_sample(devices: int) -> None:
    counts = torch.arange(SIZE) % 4 + 1

    def step(net: Callable[[Tensor], Tensor], batch: Any) -> Any:
        losses = F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")
        return (losses * batch["n"]).sum() / batch["n"].sum()

    class ReturnsRows(Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch["x"])
            return {"logits": logits, "texts": batch["id"], "loss": self.step(self.net, batch)}

    def by_tokens(batch: Any, count: int) -> list[Shard]:
        return [Shard(part.batch, int(part.batch["n"].sum())) for part in scatter(batch, count)]

    def collate(ids: list[int]) -> Any:
        return {"x": X[ids], "y": Y[ids], "n": counts[ids], "id": [str(i) for i in ids]}

    results = []
    strategy = DataParallelStrategy(scatter_fn=by_tokens)
    for trainer in (boring.trainer("auto", 1), boring.trainer(strategy, devices)):
        model = ReturnsRows(step)
        trainer.fit(model, _loader(collate))
        results.append((trainer.predict(model, _loader(collate))[0], model))
    (one, first), (many, second) = results
    boring.assert_same_weights(first, second)
    assert many.pop("texts") == one.pop("texts") == [str(i) for i in range(SIZE)]
    torch.testing.assert_close(many, one, rtol=0, atol=1e-9)


class Bag:
    """A batch as torch's page on pinned memory shows it."""

    def __init__(self, ids: list[int]) -> None:
        self.x, self.y = X[ids], Y[ids]


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda ids: torch.stack([X[ids]] * 5).transpose(0, 1).to_sparse(), "sparse_coo tensor"),
        (Bag, "a `Bag` that holds tensors"),
        (lambda ids: (X[ids], Bag(ids)), r"`batch\[1\]` is a `Bag`"),
        (lambda ids: (torch.stack([X[ids]] * 5), Y[ids]), r"`batch\[0\]` has 5 .* has 8"),
        (
            lambda ids: {"x": X[ids], "y": [[X[ids]] * SIZE]},
            "an entry per sample, or an array per input",
        ),
    ],
    ids=["sparse", "object", "object in a tuple", "sequence first", "undecided"],
)
def test_what_cannot_be_split_is_an_error_before_anything_runs(collate: Any, message: str) -> None:
    model = Model(lambda net, b: pytest.fail("the step has run"))
    with pytest.raises(ValueError, match=message) as caught:
        boring.trainer("dp", 2).fit(model, _loader(collate))
    assert "scatter_fn" in str(caught.value)
