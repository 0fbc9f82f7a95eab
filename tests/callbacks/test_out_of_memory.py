"""Batches that do not fit in memory give the same step in parts."""

import sys
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_mgpu.callbacks import NonFiniteGuard, OutOfMemoryGuard

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class _LimitedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if len(gradient) > ctx.most:
            raise torch.OutOfMemoryError(MESSAGE)
        return gradient, None


class Limited(nn.Module):
    """A layer for which there is memory for some samples only.

    Args:
        forward: How many.
        backward: How many in backward.
    """

    def __init__(self, forward: int = 99, backward: int = 99) -> None:
        super().__init__()
        self.most, self.most_in_backward, self.sizes = forward, backward, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(MESSAGE)
        self.sizes.append(len(x))
        output: Tensor = _LimitedBackward.apply(x, self.most_in_backward)
        return output


class Net(pl.LightningModule):
    """Logs in several ways, one of them before memory is short."""

    def __init__(self, limited: nn.Module, *layers: nn.Module, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        torch.manual_seed(0)
        double: Any = {"dtype": torch.float64}
        self.net = nn.Sequential(
            nn.Linear(6, 8, **double), nn.Tanh(), limited, *layers, nn.Linear(8, 3, **double)
        )
        self.limited = limited
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.log("largest", x.max(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("mean", x.mean(), on_step=False, on_epoch=True)
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.seen(loss.detach(), weight=len(y))
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Outputs(pl.Callback):
    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *_: Any) -> None:
        self.logits.append(outputs["logits"])


def fit(model: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    torch.manual_seed(3)
    options: dict[str, Any] = {"strategy": "auto", "devices": 1, "max_epochs": 2, **kwargs}
    trainer = boring.trainer(callbacks=list(callbacks), **options)
    trainer.fit(model, DataLoader(boring.blobs(44), batch_size=8, shuffle=True))
    return trainer


@pytest.mark.parametrize(
    ("limit", "kwargs"),
    [
        ({"forward": 3}, {}),
        ({"backward": 3}, {}),
        ({"forward": 4, "backward": 2}, {}),
        ({"forward": 3}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ({"backward": 3}, {"accumulate_grad_batches": 2}),
        ({"forward": 1}, {"strategy": "dp", "devices": 2}),
    ],
    ids=["forward", "backward", "both", "accumulation", "backward, accumulation", "dp"],
)
def test_same_step_in_parts(
    limit: dict[str, int], kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected, whole = Net(Limited()), Outputs()
    reference = fit(expected, whole, **kwargs)
    model, parts, guard = Net(Limited(**limit)), Outputs(), OutOfMemoryGuard()
    trainer = fit(model, parts, guard, **kwargs)
    boring.assert_same_weights(model, expected, 1e-12)
    for name, value in reference.callback_metrics.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value, msg=name)
    assert model.seen.compute() == pytest.approx(expected.seen.compute().item())
    for one, other in zip(parts.logits, whole.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert guard.parts == 4
    told = boring.told(caplog)
    assert [text.partition(": ")[0] for text in told] == [f"Out of memory ({MESSAGE})"] * 2
    assert "this batch and later ones are computed in 4 parts" in told[1]
    assert not {"training_step", "backward"} & vars(trainer.strategy).keys()


def test_memory_that_suffices_changes_no_bit() -> None:
    expected, model = Net(Limited(), nn.Dropout(0.3)), Net(Limited(), nn.Dropout(0.3))
    reference, trainer = fit(expected), fit(model, OutOfMemoryGuard())
    boring.assert_same_weights(model, expected, 0)
    assert trainer.callback_metrics == reference.callback_metrics


def test_what_differs_in_parts_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Net(Limited(3), nn.Dropout(0.2), nn.BatchNorm1d(8, dtype=torch.float64))
    trainer = fit(model, OutOfMemoryGuard(parts=3))
    told = boring.told(caplog)
    assert len(told) == 2
    assert "draws other random numbers" in told[0]
    assert "normalises each part with its own statistics" in told[1]
    assert trainer.global_step == 12


def test_buffers_of_a_failed_attempt_are_put_back() -> None:
    limited = nn.Sequential(nn.BatchNorm1d(8, dtype=torch.float64).eval(), Limited(3))
    counts = nn.BatchNorm1d(8, dtype=torch.float64, momentum=None)
    model = Net(nn.Sequential(counts, limited))
    fit(model, OutOfMemoryGuard(), max_epochs=1)
    # The last batch has four samples, and a part at least two.
    assert counts.num_batches_tracked == 5 * 4 + 2


def test_samples_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        fit(Net(Limited(0)), OutOfMemoryGuard())
    assert "cannot be smaller" in str(getattr(caught.value, "__notes__", caught.value.__cause__))


def test_other_errors_are_raised_as_they_are() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fit(Net(Broken()), OutOfMemoryGuard())


def test_gradients_of_earlier_batches_cannot_be_repaired() -> None:
    class Later(pl.Callback):
        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, idx: int) -> None:
            model.limited.most_in_backward = 99 if idx < 1 else 3

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(Net(Limited()), Later(), OutOfMemoryGuard(), accumulate_grad_batches=3)
    assert "parts=2" in str(getattr(caught.value, "__notes__", caught.value.__cause__))


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parts=0\)`: use a number from 1 on"):
        OutOfMemoryGuard(parts=0)
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(Net(Limited(), manual=True), OutOfMemoryGuard())
    with pytest.raises(MisconfigurationException, match="`chunks=32`"):
        fit(Net(Limited()), OutOfMemoryGuard(), strategy="pipeline", devices=2)


def test_both_guards_go_together(tmp_path: Any) -> None:
    expected = Net(Limited())
    fit(expected)
    for guards in (
        (NonFiniteGuard(dirpath=tmp_path), OutOfMemoryGuard()),
        (OutOfMemoryGuard(), NonFiniteGuard(dirpath=tmp_path)),
    ):
        model = Net(Limited(3))
        trainer = fit(model, *guards)
        boring.assert_same_weights(model, expected, 1e-12)
        assert "training_step" not in vars(trainer.strategy)


def test_ranks_compute_parts_of_their_own() -> None:
    """Gradients are exchanged once a step, whichever rank has how many parts."""
    expected, model = Net(Limited()), Net(Limited(3))
    kwargs: dict[str, Any] = {"strategy": "mgpu_ddp", "devices": 2}
    reference = fit(expected, **kwargs)
    trainer = fit(model, OutOfMemoryGuard(), **kwargs)
    boring.assert_same_weights(model, expected, 1e-12)
    for name, value in reference.callback_metrics.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value, msg=name)
    assert "training_step" not in vars(model)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(Net(Limited(backward=3)), OutOfMemoryGuard(), **kwargs)
    notes = str(getattr(caught.value, "__notes__", caught.value.__cause__))
    assert "ranks exchange" in notes
    assert "(By device, of rank 0: cpu: weights 664 bytes" in notes or sys.version_info < (3, 11)
