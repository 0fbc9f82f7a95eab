"""The first NaN or Inf is named and kept from the weights, whatever the strategy."""

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from going_wrong import LogOfZero, Net, Once, RareNoise, RootOfZero, fit, guard, loader
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_mgpu.callbacks import NonFiniteGuard, OutOfMemoryGuard
from lightning_mgpu.callbacks.bundle import load_bundle, model_of
from lightning_mgpu.callbacks.replay import replay
from lightning_mgpu.callbacks.step_record import Recorder
from lightning_mgpu.errors import NonFiniteError

STRATEGIES: dict[str, tuple[int, str]] = {
    "auto": (1, ""),
    "dp": (2, ", replica 1 of 2 on cpu, samples 4 to 7 of the batch"),
    "pipeline": (2, ", stage 0 of 2 on cpu, micro-batch 2 of 4"),
}
"""By strategy: devices, and where sample 5 of a batch of 8 is."""


# Lightning shuffles for training, and ranks take samples in turns: one of rank 1's third batch.
OF_RANK_1 = int(torch.randperm(48, generator=torch.Generator().manual_seed(0))[1::2][17])


def kwargs_of(strategy: str) -> dict[str, Any]:
    if strategy != "pipeline":
        return {"strategy": strategy, "devices": STRATEGIES[strategy][0]}
    from lightning_mgpu import PipelineStrategy

    return {"strategy": PipelineStrategy(split_at="net.2", chunks=4), "devices": 2}


def digest(model: nn.Module) -> str:
    state = model.state_dict().values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state)).hexdigest()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_finite_runs_are_the_same_bits(strategy: str, tmp_path: Path) -> None:
    found = []
    for each in (None, guard(tmp_path), guard(tmp_path, "rollback", rollback_steps=2)):
        model = Net(nn.Identity())
        trainer = fit(model, loader(), each, accumulate_grad_batches=2, **kwargs_of(strategy))
        found.append((digest(model), trainer.callback_metrics["error"].item()))
    assert found[0] == found[1] == found[2]
    assert "training_step" not in vars(trainer.strategy)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_names_what_went_wrong_in_backward(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit(Net(RootOfZero()), loader(21), guard(tmp_path), **kwargs_of(strategy))
    text = str(caught.value)
    assert text.startswith("Step 2 (epoch 0, batch 2): gradients of `first` (NaN).")
    where = STRATEGIES[strategy][1]
    assert f"First: Inf by `SqrtBackward0`, in backward, in `net.1`{where}; of it became" in text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_names_what_went_wrong_in_forward(strategy: str, tmp_path: Path) -> None:
    model = Net(LogOfZero())
    before = Net(LogOfZero())
    with pytest.raises(NonFiniteError) as caught:
        fit(model, loader(5), guard(tmp_path), **kwargs_of(strategy))
    text, where = str(caught.value), STRATEGIES[strategy][1]
    assert text.startswith("Step 0 (epoch 0, batch 0): the loss is NaN. First: Inf by `log` in")
    assert f"in `net.1`, in forward (going_wrong.py:26){where}; of it became NaN by `mul`" in text
    for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert one.equal(other), name
    # What was saved shows the same.
    bundle = load_bundle(next(tmp_path.iterdir()))
    again = replay(bundle, model_of(bundle), "cpu")
    assert again.then in text
    assert again.now is not None
    assert "in `net.1`, in forward" in again.now
    assert bool(again.differs) == (strategy != "auto")


def test_names_a_term_of_the_loss(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit(Net(nn.Identity(), term=True), loader(5), guard(tmp_path))
    assert "the loss is Inf. First: Inf by `log` outside of submodules, in forward" in str(
        caught.value
    )
    assert "Of what it logs, `penalty` is Inf." in str(caught.value)


class Breaks(pl.Callback):
    """Sets a weight to NaN before the second batch."""

    def on_train_batch_start(self, _: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            model.net[5].weight.data[0, 0] = float("nan")


def test_names_a_parameter_that_is_nan_already(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"NaN is in the parameter `net.5.weight`, before"):
        fit(Net(nn.Identity()), loader(), guard(tmp_path), others=[Breaks()])


def test_names_the_samples_of_a_batch_that_has_nan(tmp_path: Path) -> None:
    data = loader()
    samples: Any = data.dataset
    samples.tensors[0][[18, 21], 3] = float("nan")
    words = r"NaN is in the batch \(`batch\[0\]`, samples 2, 5\) already"
    for strategy in STRATEGIES:
        with pytest.raises(NonFiniteError, match=words):
            fit(Net(nn.Identity()), data, guard(tmp_path), **kwargs_of(strategy))


def test_replays_the_same_random_numbers(tmp_path: Path) -> None:
    samples, words = (3, 12, 20, 28, 37, 45), []
    for sample in samples:
        try:
            fit(Net(RareNoise()), loader(sample), guard(tmp_path))
        except NonFiniteError as error:
            words.append(str(error))
    assert 0 < len(words) < len(samples)
    assert all("First: Inf by `div` in `net.1`, in forward" in text for text in words)


def test_says_what_does_not_come_up_again(tmp_path: Path) -> None:
    Once.calls = 0
    with pytest.raises(NonFiniteError, match=r"is NaN\. Computed again from the same batch"):
        fit(Net(Once()), loader(), guard(tmp_path))


def test_names_the_batch_of_an_accumulation(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"Step 1 \(epoch 0, batch 4\).*in `net.1`"):
        fit(Net(RootOfZero()), loader(37), guard(tmp_path), accumulate_grad_batches=3)


def test_manual_optimization_names_gradients(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"of `first` \(NaN\)\..* not computed again"):
        fit(Net(RootOfZero(), manual=True), loader(5), guard(tmp_path))
    assert not list(tmp_path.iterdir())


class LeavesOut(pl.Callback):
    """Leaves out the optimizer's step for a batch, as a reference."""

    def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
        if trainer.global_step == 2:
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skip_leaves_out_the_step_and_nothing_else(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, model = Net(RootOfZero()), Net(RootOfZero())
    fit(expected, loader(21), others=[LeavesOut()], **kwargs_of(strategy))
    guarding = guard(tmp_path, "skip")
    trainer = fit(model, loader(21), guarding, **kwargs_of(strategy))
    assert digest(model) == digest(expected)
    assert model.seen.update_count == expected.seen.update_count == 6
    assert model.seen.compute() == expected.seen.compute()
    assert (model.steps, model.sizes) == (expected.steps, expected.sizes)
    assert guarding.skipped == 1
    assert trainer.callback_metrics["non_finite_steps"] == 1
    (told,) = [text for text in boring.told(caplog) if "SqrtBackward0" in text]
    assert "The optimizer's step is left out. (1 so far.)" in told


def test_skips_in_a_row_come_to_an_end(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"Step 4 .* number 3 in a row, more than .*skips=2"):
        fit(Net(RootOfZero()), loader(5, 19, 27, 36), guard(tmp_path, "skip", max_skips=2))
    assert [path.name for path in tmp_path.iterdir()] == ["non_finite-step0.pt"]


class Watches(pl.Callback):
    """Notes the state at the end of each batch."""

    def __init__(self) -> None:
        self.states = [""]

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        self.states.append(digest(model.net[5]))


def test_rollback_goes_back_and_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watches, guarding = Watches(), guard(tmp_path, "rollback", rollback_steps=2)
    trainer = fit(Net(RootOfZero()), loader(44), guarding, others=[watches], max_epochs=2)
    told = [text for text in boring.told(caplog) if "are back" in text]
    assert ["to those of step 2." in text for text in told] == [True, False]
    assert watches.states[6] == watches.states[2]
    assert watches.states[5] != watches.states[2] != watches.states[7]
    assert trainer.global_step == 12


def test_infinite_gradients_are_left_to_a_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(Net(nn.Identity()).float(), halves(), guard(tmp_path), plugins=[plugin])
    assert scaler.get_scale() < 2.0**127
    with pytest.raises(NonFiniteError, match="the loss is"):
        fit(Net(nn.Identity(), term=True).float(), halves(5), guard(tmp_path), plugins=[plugin])


def halves(*marked: int) -> Any:
    data = loader(*marked)
    samples: Any = data.dataset
    x, y = samples.tensors
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.float(), y), batch_size=8)


class TwoOptimizers(pl.LightningModule):
    """Steps two optimizers by one loss, which is NaN in the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = (self.a(batch[0]) + self.b(batch[0])).square().mean()
        self.manual_backward(loss * (float("nan") if batch_idx == 2 else 1.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in (self.a, self.b)]


def test_no_optimizer_of_a_step_by_hand_takes_the_nan(tmp_path: Path) -> None:
    model = TwoOptimizers()
    trainer = boring.trainer(
        "auto", 1, callbacks=[NonFiniteGuard("skip", dirpath=tmp_path)], max_epochs=1
    )
    trainer.fit(model, torch.utils.data.DataLoader(boring.blobs(24), batch_size=4))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.a.weight.grad is None or model.a.weight.grad.isfinite().all()


class Assigns(nn.Module):
    """Assigns its buffers anew, a small and a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("small", torch.zeros(3))
        self.register_buffer("large", torch.zeros(2**17))


def test_record_has_buffers_as_they_are_assigned() -> None:
    module = Assigns()
    model: Any = pl.LightningModule()
    model.net = module
    trainer: Any = SimpleNamespace(
        lightning_module=model, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    recorder = Recorder(trainer)
    for step in range(3):
        record = recorder.take((), {})
        assert record.buffers["net.small"].tolist() == [step] * 3
        assert record.buffers["net.large"][0] == step
        module.small = module.small + 1
        module.large = module.large + 1
    module.small.add_(1)
    assert recorder.take((), {}).buffers["net.small"].tolist() == [4] * 3


def test_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: Any = "halt"
    with pytest.raises(ValueError, match=r"action='halt'\)`: use 'stop', 'skip'"):
        NonFiniteGuard(unknown)
    with pytest.raises(ValueError, match=r"max_skips=0\)`: use a number from 1 on"):
        NonFiniteGuard(max_skips=0)
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="keeps to itself"):
        fit(Net(nn.Identity()), loader(), guard(tmp_path))


def test_bundle_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NonFiniteError, match=r"in `net\.1`") as caught:
        fit(Net(RootOfZero()), loader(5), guard(tmp_path / "file"))
    assert "mode=replay" not in str(caught.value)
    assert any("The step could not be saved" in text for text in boring.told(caplog))
    with pytest.raises(ValueError, match="does not load"):
        load_bundle(tmp_path / "file")
    torch.save({"format": 0}, tmp_path / "file")
    with pytest.raises(ValueError, match="was not written by `NonFiniteGuard`"):
        load_bundle(tmp_path / "file")


def test_model_that_does_not_pickle_is_built_from_its_hyperparameters(tmp_path: Path) -> None:
    class Thread(Net):
        def __init__(self, rate: float = 0.5) -> None:
            super().__init__(RootOfZero())
            self.save_hyperparameters()
            self.lock = threading.Lock()

    with pytest.raises(NonFiniteError, match="mode=replay"):
        fit(Thread(rate=0.25), loader(5), guard(tmp_path))
    bundle = load_bundle(next(tmp_path.iterdir()))
    model = model_of(bundle)
    assert model.hparams == {"rate": 0.25}
    again = replay(bundle, model, "cpu")
    assert again.now is not None
    assert again.now in again.then
    bundle["hparams"]["missing"] = 1
    with pytest.raises(ValueError, match=r"could not be pickled .*call `self.save_hyperparam"):
        model_of(bundle)


def test_memory_and_nan_at_once(tmp_path: Path) -> None:
    """The step that is computed again is computed in parts, as it was."""
    guards = [OutOfMemoryGuard(parts=2)]
    with pytest.raises(NonFiniteError, match=r"Inf by `SqrtBackward0`, in backward, in `net.1`"):
        fit(Net(RootOfZero()), loader(5), guard(tmp_path), others=guards)


def test_ranks_agree(tmp_path: Path) -> None:
    """Rank 1 alone has a NaN of its own; the other has it from the reduction, or not at all."""
    # A loss of Inf with finite gradients: nothing tells the other rank but the callback.
    model, guarding = Net(nn.Identity(), term=True), guard(tmp_path, "skip", bundle=False)
    fit(model, loader(OF_RANK_1), guarding, strategy="mgpu_ddp", devices=2)
    assert guarding.skipped == 1
    expected = Net(nn.Identity(), term=True)
    fit(expected, loader(OF_RANK_1), others=[LeavesOut()], strategy="mgpu_ddp", devices=2)
    assert digest(model) == digest(expected)
    with pytest.raises(NonFiniteError, match=r"Step 2 .*SqrtBackward0.*in `net.1`, rank 1 of 2"):
        fit(Net(RootOfZero()), loader(OF_RANK_1), guard(tmp_path), strategy="mgpu_ddp", devices=2)
    (path,) = tmp_path.iterdir()
    assert path.name == "non_finite-step2-rank1.pt"
    bundle = load_bundle(path)
    again = replay(bundle, model_of(bundle), "cpu")
    assert again.now is not None
    assert again.now.startswith("Step 2 (epoch 0, batch 0): gradients of `first` (NaN).")


@pytest.mark.slow
def test_ranks_of_pipelines_agree(tmp_path: Path) -> None:
    words = r"SqrtBackward0.*in `net.1`, stage 0 of 2 on cpu, micro-batch \d of \d, rank 1 of 2"
    with pytest.raises(NonFiniteError, match=words):
        fit(
            Net(RootOfZero()),
            loader(OF_RANK_1),
            guard(tmp_path),
            strategy="pipeline_ddp",
            devices=4,
        )
