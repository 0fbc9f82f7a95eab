"""What a LightningModule and its Trainer see of the pipeline."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
)
from torch import Tensor, nn

from lightning_mgpu import PipelineStrategy
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition import cutter as cutting
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, Measured
from lightning_mgpu.engine.pipeline.partition.observation import registered
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.strategies.stages import planning
from lightning_mgpu.strategies.stages.placement import place, state_to_parameters


class Deep(parity_models.Model):
    """Six linear layers: enough for four stages."""

    def build(self) -> nn.Module:
        layers = [nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)]
        return nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))


class Dropping(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(6, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 8), nn.Dropout(0.5)),
            nn.Linear(8, 3),
        )


def _fit(model: pl.LightningModule, devices: int = 2, **kwargs: Any) -> pl.Trainer:
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in _OPTIONS}
    trainer = boring.trainer(PipelineStrategy(**options), devices, **kwargs)
    trainer.fit(model, datamodule=boring.Blobs(10))
    return trainer


_OPTIONS = {
    *("module", "split_at", "balance", "chunks", "checkpoint", "split_args", "stages_per_device"),
    "defer_weight_gradients",
}


def test_forward_is_put_back_and_hidden_from_copies() -> None:
    seen = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            assert "forward" in vars(model.net)
            copied, loaded = copy.deepcopy(model.net), pickle.loads(pickle.dumps(model.net))
            for other in (copied, loaded):
                assert other.forward.__func__ is nn.Sequential.forward
                assert other.forward.__self__ is other
                seen.append(other)

    model = Deep("adam")
    _fit(model, callbacks=[Copies()])
    assert "forward" not in vars(model.net)
    torch.testing.assert_close(seen[-1].state_dict(), model.net.state_dict())


def test_a_forward_of_the_instance_is_put_back() -> None:
    model = Deep()
    own = model.net.forward
    model.net.forward = own
    _fit(model)
    assert vars(model.net)["forward"] is own


def test_fit_twice_and_every_other_entry_point() -> None:
    alone, split = Deep("adam"), Deep("adam")
    results = []
    for model, strategy, devices in ((alone, "auto", 1), (split, PipelineStrategy(), 2)):
        data = boring.Blobs(10)
        trainer = boring.trainer(strategy, devices, max_epochs=1)
        trainer.fit(model, datamodule=data)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, datamodule=data)
        (validated,) = trainer.validate(model, datamodule=data, verbose=False)
        (tested,) = trainer.test(model, datamodule=data, verbose=False)
        results.append((validated, tested, torch.cat(trainer.predict(model, datamodule=data))))
    assert results[1][0] == pytest.approx(results[0][0])
    assert results[1][1] == pytest.approx(results[0][1])
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_any_number_of_stages_gives_the_same(stages: int) -> None:
    alone, split = Deep("adam"), Deep("adam")
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    _fit(split, stages)
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)


def test_weights_after_forty_steps_with_everything() -> None:
    options: dict[str, Any] = {
        "max_epochs": 8,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
    }
    alone, split = Deep("adam"), Deep("adam")
    boring.trainer("auto", 1, **options).fit(alone, datamodule=boring.Blobs(5))
    trainer = _fit_data(split, boring.Blobs(5), **options)
    assert trainer.global_step == 40
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)


def _fit_data(model: pl.LightningModule, data: Any, **kwargs: Any) -> pl.Trainer:
    trainer = boring.trainer(PipelineStrategy(), 2, **kwargs)
    trainer.fit(model, datamodule=data)
    return trainer


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_checkpoint_continues_on_other_numbers_of_stages(devices: int, tmp_path: Path) -> None:
    uninterrupted = Deep("adam")
    boring.trainer("auto", 1, max_epochs=2).fit(uninterrupted, datamodule=boring.Blobs(10))
    half = Deep("adam")
    path = tmp_path / "half.ckpt"
    _fit(half, 2, max_epochs=1).save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert saved.keys() == Deep().state_dict().keys()
    rest = Deep("adam")
    strategy: Any = PipelineStrategy() if devices > 1 else "auto"
    trainer = boring.trainer(strategy, devices, max_epochs=2)
    trainer.fit(rest, datamodule=boring.Blobs(10), ckpt_path=path)
    torch.testing.assert_close(rest.state_dict(), uninterrupted.state_dict(), rtol=0, atol=1e-9)


def test_callbacks_work_as_on_one_device(tmp_path: Path) -> None:
    stopped = []
    for strategy, devices in (("auto", 1), (PipelineStrategy(), 2)):
        model = Deep("adam")
        checkpoint = ModelCheckpoint(tmp_path / str(devices), monitor="val_loss")
        stop = EarlyStopping("val_acc", patience=1, mode="max", min_delta=0.2)
        trainer = boring.trainer(
            strategy,
            devices,
            max_epochs=20,
            enable_checkpointing=True,
            callbacks=[checkpoint, stop, EMAWeightAveraging(decay=0.9)],
        )
        trainer.fit(model, datamodule=boring.Blobs(10))
        weights = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
        stopped.append((stop.stopped_epoch, float(checkpoint.best_model_score), weights))
    assert stopped[0][0] == stopped[1][0] > 0
    assert stopped[0][1] == pytest.approx(stopped[1][1], abs=1e-9)
    torch.testing.assert_close(stopped[1][2], stopped[0][2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
def test_seeded_runs_repeat_bit_for_bit(checkpoint: Any, per_device: int) -> None:
    weights = []
    for _ in range(3):
        torch.manual_seed(1)
        model = Dropping("adam")
        _fit(model, checkpoint=checkpoint, stages_per_device=per_device, max_epochs=2)
        weights.append(model.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert torch.equal(other[name], value), name


class Drawing(parity_models.Model):
    """Draws in several ways, each of them within a layer."""

    class Layer(nn.Module):
        def __init__(self, features: int, draw: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.linear, self.draw = nn.Linear(6, features), draw

        def forward(self, x: Tensor) -> Tensor:
            return self.draw(self.linear(x))

    def build(self) -> nn.Module:
        return nn.Sequential(
            self.Layer(6, lambda x: x * torch.rand(x.shape)),
            self.Layer(6, lambda x: torch.native_dropout(x, 0.5, True)[0]),  # takes no generator
            self.Layer(6, lambda x: nn.functional.rrelu(x, training=True)),
            self.Layer(3, lambda x: x + torch.randn_like(x)),
        )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", [Dropping, Drawing])
def test_recomputation_draws_the_same_masks(kind: type[parity_models.Model]) -> None:
    weights = []
    for checkpoint in ("never", "except_last", "always"):
        torch.manual_seed(1)
        model = kind()
        _fit(model, checkpoint=checkpoint, max_epochs=2)
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights[2], weights[0], rtol=0, atol=1e-12)


class Again(nn.Module):
    """Activation checkpointing of the user's own, around batch normalisation."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)


class Normalised(parity_models.Model):
    again = False

    def build(self) -> nn.Module:
        return nn.Sequential(*(Again(self.again) for _ in range(3)), nn.Linear(6, 3))


class NormalisedAgain(Normalised):
    again = True


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("split_at", ["net.1", "net.1.layers.1"])
def test_statistics_count_once_whatever_is_computed_again(split_at: str, deferred: bool) -> None:
    found = []
    for kind in (Normalised, NormalisedAgain):
        model = kind()
        strategy = PipelineStrategy(split_at=split_at, deferred_batch_norm=deferred)
        boring.trainer(strategy).fit(model, datamodule=boring.Blobs(10))
        found.append(model.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_dropout_differs_between_micro_batches_steps_and_runs() -> None:
    class Ones(parity_models.Model):
        def __init__(self) -> None:
            super().__init__()
            self.masks: list[Tensor] = []

        def build(self) -> nn.Module:
            return nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Linear(64, 64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.net[2].weight.copy_(torch.eye(64))
            output = self.net(torch.ones(8, 64, dtype=torch.float64))
            self.masks.append((output - self.net[2].bias).detach().round())
            return output.sum()

    torch.manual_seed(3)
    model = Ones()
    for _ in range(2):
        trainer = boring.trainer(PipelineStrategy(chunks=4, split_at="net.1"), 2, max_steps=2)
        trainer.fit(model, boring.Blobs().train_dataloader())
    rows = {tuple(row) for mask in model.masks for row in mask.tolist()}
    assert len(rows) == 4 * 8


def test_hooks_of_parameters_fire_once_a_batch() -> None:
    calls = []

    class Hooked(Deep):
        def on_fit_start(self) -> None:
            self.net[0][0].weight.register_hook(lambda g: calls.append("tensor"))
            self.net[5][0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("post"))

    trainer = _fit(Hooked())
    assert calls.count("tensor") == calls.count("post") == trainer.global_step == 5


def test_no_graph_under_no_grad_and_in_evaluation() -> None:
    class NoGrad(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                assert not self.net(batch[0]).requires_grad
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            output = self.net(batch[0])
            assert output.grad_fn is None
            modes.append((torch.is_inference_mode_enabled(), output.is_inference()))

    modes: list[tuple[bool, bool]] = []
    model = NoGrad()
    _fit(model).validate(model, boring.Blobs(10).val_dataloader(), verbose=False)
    assert set(modes) == {(False, False), (True, True)}


def test_backward_twice_and_keeping_the_graph() -> None:
    class Twice(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            parameters = list(self.net.parameters())
            loss = self._loss(batch)
            kept = torch.autograd.grad(loss, parameters, retain_graph=True)
            again = torch.autograd.grad(loss, parameters)
            for a, b in zip(kept, again, strict=True):
                assert torch.equal(a, b)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(loss, parameters)
            return self._loss(batch)

    _fit(Twice())


def test_gradients_of_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"create_graph=True.*strategy='dp'"):
        _fit(parity_models.GradientPenalty())


def test_module_of_choice() -> None:
    class Two(Deep):
        expected: str

        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()

        def forward(self, x: Tensor) -> Tensor:
            assert ("forward" in vars(self.small)) == (self.expected == "small")
            assert ("forward" in vars(self.net)) == (self.expected == "net")
            assert ("forward" in vars(self)) == (self.expected == "")
            return self.net(self.small(x))

    for options, expected in (
        ({}, "net"),
        ({"module": "small"}, "small"),
        ({"module": "small", "split_at": "small.1"}, "small"),
        ({"module": ""}, ""),
        ({"module": "", "split_at": ["net.3"]}, ""),
    ):
        model = Two()
        model.expected = expected
        _fit(model, **options)


def test_list_of_layers_is_cut_in_the_forward_of_the_model() -> None:
    class Listed(Deep):
        def build(self) -> nn.Module:
            return nn.ModuleList(Deep.build(self))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.net:
                x = layer(x)
            return x

    alone, split = Listed(), Listed()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    trainer = _fit(split, split_at="net.3")
    assert trainer.strategy._module is None
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)


def test_stages_of_the_models_own() -> None:
    class First(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return (self.net.layers[0](x, mask) if float(mask[0, 0]) == 0 else x), mask

    class Second(First):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.net.head(self.net.layers[1](x, mask)[:, 0])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2).layers
            self.head = nn.Linear(2, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, mask)
            return self.head(x[:, 0])

    class Own(parity_models.Model):
        build = Net

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
            return self.net(x.unflatten(1, (3, 2)), mask)

    class Staged(Own):
        def configure_pipeline(self) -> list[nn.Module]:
            stages = [
                _Part(First(self.net), ["layers.0"]),
                _Part(Second(self.net), ["layers.1", "head"]),
            ]
            return stages

    class _Part(nn.Module):
        """Registers only the modules that its stage uses."""

        def __init__(self, stage: nn.Module, names: list[str]) -> None:
            super().__init__()
            self.used = nn.ModuleList(stage.net.get_submodule(name) for name in names)
            self.call = stage.forward

        def forward(self, *args: Any) -> Any:
            return self.call(*args)

    alone, split, layered = Own(), Staged(), Own()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    _fit(split)
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)
    _fit(layered, split_at="net.layers.1")
    torch.testing.assert_close(layered.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)


def test_stages_of_the_models_own_are_checked() -> None:
    class Wrong(Deep):
        def configure_pipeline(self) -> Any:
            return self.answer

    for answer, message in (
        (None, "must return a list of modules, one for each stage; it returned None"),
        ([nn.Identity()], "`configure_pipeline` makes 1 stages, but there are 2 devices"),
    ):
        model = Wrong()
        model.answer = answer
        with pytest.raises(PartitionError, match=message):
            _fit(model)


def test_table_of_stages_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    _fit(Deep(), split_at="net.2", chunks=4)
    lines = _table(caplog)
    assert lines[1].split() == ["stage", "device", "layers", "parameters"]
    # (6 + 1) x 8 and (8 + 1) x 8 parameters of 8 bytes.
    assert lines[2].split() == ["0", "cpu", "0", "..", "1", "(2)", "1.02", "kB"]
    assert lines[3].split() == ["1", "cpu", "2", "..", "5", "(4)", "1.94", "kB"]
    assert lines[4] == "4 micro-batches; devices wait 20% of the time if all take equally long."


def test_table_of_several_stages_on_a_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    _fit(Deep(), split_at=["net.2", "net.3", "net.4"], stages_per_device=2, chunks=4)
    lines = _table(caplog)
    assert [line.split()[2] for line in lines[2:6]] == ["0", "2", "3", "4"]
    assert lines[6] == "4 micro-batches; devices wait 11% of the time if all take equally long."


def test_table_with_deferred_gradients(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    _fit(Deep(), split_at="net.2", chunks=4, defer_weight_gradients=True)
    assert _table(caplog)[4].startswith("4 micro-batches; devices wait 14% of the time")


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_model_summary_shows_the_bytes_of_stages(
    kind: type[ModelSummary], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    summary = kind()
    options = {"callbacks": [summary], "enable_model_summary": True}
    _fit(Deep(), split_at="net.2", chunks=4, **options)
    lines = [
        re.split(r"[\s|│]+", line) for line in (caplog.text + capsys.readouterr().out).split("\n")
    ]
    (first,), (second,) = (
        [line for line in lines if f"stage {stage}" in " ".join(line)] for stage in (0, 1)
    )
    assert " ".join(first).strip() == "stage 0 cpu 1.02 kB"
    assert " ".join(second).strip() == "stage 1 cpu 1.94 kB"

    caplog.clear()
    boring.trainer("auto", 1, **options).fit(Deep(), datamodule=boring.Blobs(10))
    assert "stage 0" not in caplog.text + capsys.readouterr().out


@pytest.mark.parametrize("balance", ["time", "memory"])
def test_measured_balance(balance: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One layer takes far longer, another keeps far more, than all others together."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(400):
                x = x + x.detach() * 0
            return x

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.repeat(1, 2000).exp() * 0).sum(1, keepdim=True) + x

    class Uneven(parity_models.Model):
        def build(self) -> nn.Module:
            layers = [nn.Linear(6, 6) for _ in range(8)]
            layers[1] = Large()
            layers[6] = Slow()
            return nn.Sequential(*layers, nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))

    caplog.set_level("INFO")
    alone, split = Uneven(), Uneven()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    _fit(split, balance=balance, chunks=1)
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)
    lines = _table(caplog)
    assert lines[1].split()[-2:] == ["activations", "time"]
    first = re.split(r" {2,}", lines[2])[2]
    assert first == ("0 .. 5 (6)" if balance == "time" else "0 .. 1 (2)") or (
        balance == "time" and first == "0 .. 6 (7)"
    )


@pytest.mark.parametrize("hand_over", [0.0, 1.0])
def test_stages_per_device_are_chosen_once(
    hand_over: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers of which each takes a second, and validation on the cut before training is."""
    measured, around = [], 1 if hand_over else 3

    def costs(module: nn.Module, *_: Any) -> Any:
        measured.append(module)
        called = registered(module)
        return Measured(called, {call.name: Cost(1.0, 1, 2, 0.5) for call in called.walk()})

    monkeypatch.setattr(cutting, "measured", costs)
    monkeypatch.setattr(planning, "hand_over_seconds", lambda *_: hand_over)
    caplog.set_level("INFO")
    alone, split = Deep("adam"), Deep("adam")
    strategy = PipelineStrategy(stages_per_device="auto", chunks=4)
    trainer, reference = (boring.trainer(s, d) for s, d in ((strategy, 2), ("auto", 1)))
    trainer.validate(split, datamodule=boring.Blobs(10), verbose=False)
    for epochs in (1, 2):
        for model, run in ((split, trainer), (alone, reference)):
            run.fit_loop.max_epochs = epochs
            run.fit(model, datamodule=boring.Blobs(10))
        assert strategy.stage_devices == [torch.device("cpu")] * 2  # not any more
    boring.assert_same_weights(split, alone)
    assert len(measured) == 2, "once without training, and once for both times of training"
    validated, first, second = (
        record.message.splitlines() for record in caplog.records if "Pipeline:" in record.message
    )
    assert first == validated
    assert len(first) == len(second) == 4 + 2 * around
    assert first[-1] == second[-1]
    assert re.fullmatch(
        rf"{around} per device, the quickest of the simulated steps"
        r" \(1: \S+ s, 2: \S+ s, 3: \S+ s, 4: \S+ s\)\.",
        first[-1],
    )


def test_stages_of_the_models_own_say_how_many_there_are() -> None:
    class Own(Deep):
        def configure_pipeline(self) -> list[nn.Module]:
            return [self.net[:2], self.net[2], self.net[3], self.net[4:]]

    alone, split = Deep(), Own()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    _fit(split, stages_per_device="auto")
    boring.assert_same_weights(split, alone)


def test_measured_balance_begins_on_the_first_device() -> None:
    model = Deep()
    strategy = PipelineStrategy(
        balance="time", parallel_devices=[torch.device("meta"), torch.device("cpu")]
    )
    strategy.connect(model)
    strategy.model_to_device()
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    strategy._release()


def test_measured_costs_of_layers() -> None:
    module = nn.Sequential(
        *(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.ReLU(inplace=True)),
        *(nn.BatchNorm1d(3), nn.Dropout(0.5)),
    )
    state = torch.get_rng_state()
    cutter = Cutter(module, module.forward, 2, balanced="memory")
    splitter, devices = Splitter(), [torch.device("cpu")] * 2
    pipeline = Pipeline(cutter, splitter, devices, chunks=Chunks(2, 2))
    try:
        pipeline(torch.ones(20, 6))
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        pipeline.close()
    costs = cutter.costs
    assert module[4].num_batches_tracked == 1
    assert module[4].momentum == 0.1
    assert list(costs) == ["0", "1", "2", "3", "4", "5"]
    assert [c.parameters for c in costs.values()] == [7 * 8 * 4, 0, 9 * 3 * 4, 0, 6 * 4, 0]
    # The first layer keeps its input; the second its output, which is the third's input.
    assert [cost.activations for cost in costs.values()][:4] == [240, 320, 0, 120]
    assert all(cost.seconds > 0 for cost in costs.values())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_chunks_are_tried_and_the_quickest_kept() -> None:
    chunks = Chunks(2, None)
    seconds = {2: 3.0, 4: 1.0, 8: 2.0, 16: 4.0}
    tried = []
    for samples in [32, 32, 15, 32, *[32] * 9, 32]:
        tried.append(chunks.next(samples))
        chunks.took(tried[-1], seconds[tried[-1]] * samples, samples)
    # A batch too small for all to be tried counts for none.
    assert tried == [2, 2, 8, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 4]
    assert chunks.usual == 4
    assert Chunks(2, 5).next(100) == Chunks(2, 5).usual == 5


def test_chunks_auto_gives_the_same_as_one_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    alone, split = Deep("adam"), Deep("adam")
    auto = PipelineStrategy(chunks="auto")
    for model, strategy, devices in ((alone, "auto", 1), (split, auto, 2)):
        boring.trainer(strategy, devices, max_epochs=5).fit(model, datamodule=boring.Blobs(16))
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-9)
    assert "chunks='auto': of [2, 4, 8, 16]" in caplog.text


def _table(caplog: pytest.LogCaptureFixture) -> list[str]:
    (text,) = [record.message for record in caplog.records if "Pipeline:" in record.message]
    return text.splitlines()


def test_tensors_and_state_lie_with_their_stage() -> None:
    """Another device that every machine has: one without memory."""
    model = Deep()
    cut = Cutter(model.net, model.net.forward, 2, ["3"]).expected()
    assert cut is not None
    devices = [torch.device("cpu"), torch.device("meta")]
    place(model, cut, devices)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        moments = torch.zeros(parameter.shape)
        optimizer.state[parameter] = {"exp_avg": moments, "step": torch.tensor(1.0)}
    state_to_parameters([optimizer])
    for name, parameter in model.named_parameters():
        expected = devices[name.startswith(("net.3", "net.4", "net.5"))]
        assert parameter.device == expected, name
        assert optimizer.state[parameter]["exp_avg"].device == expected
        assert optimizer.state[parameter]["step"].device == devices[0]
    assert model.device == devices[0]


def test_activations_are_released_as_backward_goes() -> None:
    """Each micro-batch's graph dies with its backward, not with that of the whole batch."""
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = torch.ones(3)
            alive.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive))
            return gradient

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Watch.apply(x)

    class Model(parity_models.Model):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 8), Watched(), nn.Identity(), nn.Linear(8, 3))

    trainer = boring.trainer(
        PipelineStrategy(chunks=4, split_at="net.2"), 2, max_steps=1, num_sanity_val_steps=0
    )
    trainer.fit(Model(), boring.Blobs(8).train_dataloader())
    assert counts == [4, 3, 2, 1]


def test_command_line_option(tmp_path: Path) -> None:
    trainer = boring.trainer("pipeline", 2)
    assert isinstance(trainer.strategy, PipelineStrategy)
    assert trainer.strategy.root_device == torch.device("cpu")


def test_strategy_can_be_pickled_while_it_runs() -> None:
    class Pickles(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            state = pickle.loads(pickle.dumps(trainer.strategy.__getstate__()["_split_at"]))
            assert state == ["net.2"]
            assert trainer.strategy.__getstate__()["_pipeline"] is None

    _fit(Deep(), split_at="net.2", callbacks=[Pickles()])
    copied = pickle.loads(pickle.dumps(PipelineStrategy(split_at="net.2", chunks=3)))
    boring.trainer(copied, 2).fit(Deep(), datamodule=boring.Blobs(10))
