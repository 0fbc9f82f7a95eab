"""The comparison on the first batch, and what `forward` leaves behind."""

import logging
import random
from typing import Any

import boring
import numpy as np
import parity_models
import pytest
import torch
from pipelines import Apply, Net, assert_same, data, pipelined
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mgpu import PipelineStrategy
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError


def _attention(h: Tensor) -> Tensor:
    return F.softmax(h @ h.T, -1) @ h


MIXING: dict[str, Any] = {
    "centred": lambda h: h - h.mean(0),
    "attention": _attention,
    "normalised": lambda h: F.normalize(h, dim=0),
    "sorted": lambda h: h.sort(0).values,
    "rolled": lambda h: h.roll(1, 0),
    "cumulated": lambda h: h.cumsum(0),
}


@pytest.mark.parametrize("middle", MIXING.values(), ids=MIXING.keys())
@pytest.mark.parametrize("samples", [2, 3, 4, 8, 13])
def test_layers_that_mix_samples_are_refused(middle: Any, samples: int) -> None:
    with (
        pipelined(Net(middle)) as run,
        pytest.raises(
            SplitError, match=r"`Net.forward` gives different values.*`output`.*chunks=1"
        ),
    ):
        run(data(samples, 6, seed=4))


def test_layers_that_mix_samples_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    with pipelined(Net(MIXING["centred"]), parity_check="warn") as run:
        for _ in range(3):
            run(data(8, 6))
    assert len(caplog.records) == 1
    assert "depends on other samples" in caplog.text
    caplog.clear()
    with pipelined(Net(MIXING["centred"]), parity_check="off") as run:
        run(data(8, 6))
    assert not caplog.records


def test_a_first_batch_of_one_sample_is_checked_with_the_next() -> None:
    with pipelined(Net(MIXING["centred"])) as run:
        run(data(1, 6))
        with pytest.raises(SplitError, match="depends on other samples"):
            run(data(8, 6))


def test_each_kind_of_call_is_checked() -> None:
    class Sometimes(Net):
        def forward(self, x: Tensor, mixed: bool = False, mask: Tensor | None = None) -> Any:
            z = super().forward(x)
            if mask is not None or not self.training:
                return z.flip(0)
            return z - z.mean(0) if mixed else z

    for kwargs, mode in (({"mixed": True}, True), ({"mask": torch.ones(1)}, True), ({}, False)):
        module = Sometimes()
        with pipelined(module) as run:
            run(data(8, 6))
            module.train(mode)
            with pytest.raises(SplitError, match="depends on other samples"):
                run(data(8, 6), **kwargs)


class Noisy(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(self, x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda self, x: torch.randn_like(x),
        lambda self, x: torch.randn(x.shape, generator=self.generator).double(),
        lambda self, x: torch.from_numpy(self.numpy.normal(size=tuple(x.shape))),
        lambda self, x: F.dropout(x, 0.5),
        lambda self, x: F.gumbel_softmax(x),
    ],
    ids=["torch", "generator", "numpy", "dropout", "gumbel"],
)
def test_random_layers_raise_no_alarm(draw: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pipelined(Net(Noisy(draw))) as run:  # type: ignore[arg-type]
        run(data(8, 6))
    assert not caplog.records


def test_dropout_does_not_hide_a_layer_that_mixes_samples() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.3, batch_first=True).double()

    def middle(h: Tensor) -> Tensor:
        return attention(F.dropout(h, 0.2)[None])[0]  # the batch taken for time

    with pipelined(Net(middle)) as run, pytest.raises(SplitError, match="depends on other samples"):
        run(data(8, 6))


@pytest.mark.parametrize(
    "normalisation",
    [
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, track_running_stats=False),
        Apply(lambda h: F.batch_norm(h, None, None, training=True)),
        nn.LayerNorm(8),
        nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (4, 2)), nn.GroupNorm(2, 4), nn.Flatten()),
    ],
    ids=["batch", "untracked", "functional", "layer", "instance", "group"],
)
def test_normalisation_raises_no_alarm(
    normalisation: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with pipelined(Net(normalisation.double())) as run:  # type: ignore[arg-type]
        run(data(8, 6))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_raises_no_alarm(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    wide = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)))
    module = wide.to(dtype)
    with pipelined(module, split_at="4") as run:
        run(data(8, 64).to(dtype))
    assert not caplog.records


def test_the_check_leaves_no_trace() -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
            self.register_buffer("calls", torch.tensor(0))
            self.cache: dict[str, Any] = {}
            self.seen: list[int] = []
            self.count, self.nested = 0, {"a": [0]}

        def forward(self, h: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.1)
                self.calls += 1
            self.count += 1
            self.cache.setdefault("n", torch.arange(3))
            self.seen.append(len(h))
            self.nested["a"][0] += 1
            return h + torch.randn_like(h)

    found = []
    for mode in ("warn", "off"):
        torch.manual_seed(5)
        random.seed(5)
        module = Net(Traced())  # type: ignore[arg-type]
        state = module.middle.function
        with pipelined(module, parity_check=mode) as run:
            output = run(data(8, 6))
        drawn = torch.rand(1), random.random()
        found.append((output, state.state_dict(), drawn, state.count, state.seen, state.nested))
    assert found[0][3:] == found[1][3:] == (4, [2, 2, 2, 2], {"a": [4]})
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=0, atol=0)


def test_hooks_that_only_look_see_each_micro_batch_once() -> None:
    module, seen = Net(), []
    module.first.register_forward_hook(lambda m, args, output: seen.append(len(output)))
    with pipelined(module) as run:
        run(data(8, 6))
    assert seen == [2, 2, 2, 2]


def test_runs_are_bit_for_bit_what_they_are_without_the_check() -> None:
    class Dropping(parity_models.Model):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))

    weights = []
    for mode in ("error", "warn", "off"):
        torch.manual_seed(1)
        model = Dropping("adam")
        strategy = PipelineStrategy(parity_check=mode)
        boring.trainer(strategy, 2).fit(model, datamodule=boring.Blobs(10))
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[1:], [weights[0]] * 2, rtol=0, atol=0)


def test_a_check_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Large(Net):
        def forward(self, x: Tensor) -> Any:
            assert x.shape[0] in (8, 4), "of no other size"
            return super().forward(x)

    caplog.set_level(logging.WARNING)
    module = Net(Apply(lambda h: _of_size(h, 4)))  # type: ignore[arg-type]
    with pipelined(module, chunks=2) as run:
        assert run(data(8, 6)).shape == (8, 4)
    assert not caplog.records


def _of_size(h: Tensor, size: int) -> Tensor:
    if len(h) != size:
        raise RuntimeError("of no other size")
    return h


# What `forward` leaves behind.


class Expert(nn.Module):
    """Leaves a loss behind, as mixtures of experts do."""

    def __init__(self, leave: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("ema", torch.zeros(8))
        self.leave, self.aux, self.store = leave, None, {}
        self.history: list[Any] = []

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        self.leave(self, h)
        return h


def _expert(leave: Any) -> Net:
    return Net(Expert(leave).double())  # type: ignore[arg-type]


def _set(name: str, value: Any) -> Any:
    return lambda self, h: setattr(self, name, value(self, h))


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize(
    ("leave", "name"),
    [
        (_set("aux", lambda self, h: h.square().mean()), "Expert.aux"),
        (_set("aux", lambda self, h: {"loss": [h.mean()]}), "Expert.aux['loss'][0]"),
        (lambda self, h: self.store.update(loss=h.mean()), "Expert.store['loss']"),
        (lambda self, h: self.history.append(h.mean()), "Expert.history["),
        (_set("ema", lambda self, h: 0.9 * self.ema + 0.1 * h.mean(0)), "Expert.ema"),
    ],
    ids=["attribute", "nested", "dict", "list", "buffer"],
)
def test_what_is_left_behind_with_a_gradient_is_refused(
    leave: Any, name: str, checkpoint: Any
) -> None:
    with (
        pipelined(_expert(leave), checkpoint=checkpoint) as run,
        pytest.raises(SplitError, match="Return it from the split module's `forward`") as raised,
    ):
        run(data(8, 6))
    assert f"`{name}" in str(raised.value)


@pytest.mark.parametrize(
    ("leave", "name"),
    [
        (_set("aux", lambda self, h: h.detach()), "Expert.aux"),
        (_set("aux", lambda self, h: h.mean().item()), "Expert.aux"),
        (_set("ema", lambda self, h: (0.9 * self.ema + h.mean(0)).detach()), "Expert.ema"),
        (lambda self, h: self.ema.lerp_(h.detach().mean(0), 0.1), "Expert.ema"),
        (lambda self, h: self.ema.data.lerp_(h.detach().mean(0), 0.1), "Expert.ema"),
    ],
    ids=["features", "number", "assigned", "in place", "data"],
)
def test_what_is_left_behind_is_warned_about_once(
    leave: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = _expert(leave)
    with pipelined(module) as run:
        for mode in (True, True, False):
            module.train(mode)
            run(data(8, 6))
    (record,) = caplog.records
    assert f"`{name}` (in `middle.function`)" in record.getMessage()


@pytest.mark.parametrize(
    "leave",
    [
        _set("aux", lambda self, h: torch.arange(4.0)),
        _set("aux", lambda self, h: tuple(h.shape)),
        _set("aux", lambda self, h: "called"),
        lambda self, h: self.store.setdefault("cos", torch.arange(4.0)),
        lambda self, h: self.ema.add_(h.detach().sum(0)),
        _set("aux", lambda self, h: (self.aux or 0) + len(h)),
        _set("aux", lambda self, h: self.linear),
        lambda self, h: None,
    ],
    ids=["constant", "shape", "text", "cache", "sum", "count", "module", "nothing"],
)
def test_what_comes_out_alike_raises_no_alarm(leave: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pipelined(_expert(leave)) as run:
        run(data(8, 6))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["closure", "object", "global"])
def test_what_hooks_keep_is_refused(kind: str) -> None:
    module = Net()
    features: dict[str, Tensor] = {}

    class Catcher:
        def __init__(self) -> None:
            self.found: list[Tensor] = []

        def __call__(self, m: Any, args: Any, output: Tensor) -> None:
            self.found.append(output)

    hooks: dict[str, Any] = {
        "closure": lambda m, args, output: features.update(first=output),
        "object": Catcher(),
        "global": _remember,
    }
    module.first.register_forward_hook(hooks[kind])
    with pipelined(module) as run, pytest.raises(SplitError, match="kept by a hook of `first`"):
        run(data(8, 6))
    assert not features
    assert not _REMEMBERED


_REMEMBERED: list[Tensor] = []


def _remember(module: Any, args: Any, output: Tensor) -> None:
    _REMEMBERED.append(output)


@pytest.mark.parametrize("shape", [(8, 8), (8, 1), (8,)])
def test_conditions_that_the_step_sets_are_refused_by_name(shape: tuple[int, ...]) -> None:
    class Conditioned(Net):
        cond: Tensor | None = None

        def forward(self, x: Tensor) -> Any:
            return self.second(self.middle(self.first(x)))

    class Inside(nn.Module):
        cond = torch.zeros(1, dtype=torch.float64)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.cond

    module = Conditioned(Inside())  # type: ignore[arg-type]
    with pipelined(module, chunks=8) as run:
        run(data(8, 6))
        module.middle.function.cond = data(*shape)
        with pytest.raises(SplitError, match=r"`Inside.cond` \(in `middle.function`\).*argument"):
            run(data(8, 6))
        module.unread = data(8, 6)
        module.middle.function.cond = data(1, 8)  # one for all samples
        torch.testing.assert_close(run(data(8, 6)), module.forward(data(8, 6)))


class _Stateful(nn.Module):
    """Normalises with numbers that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("n", torch.tensor(0))
        self.calls, self.seen = 0, [0]

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
            self.n = self.n + 1
            self.calls += 1
            self.seen[0] += 1
        return (h - self.mean) * (1 + self.n) * self.calls


def test_recomputation_changes_nothing() -> None:
    found = []
    for checkpoint in ("never", "except_last", "always"):
        module = Net(_Stateful())  # type: ignore[arg-type]
        state = module.middle.function
        with pipelined(module, parity_check="off", checkpoint=checkpoint) as run:
            gradients = []
            for seed in (1, 2):
                loss = run(data(8, 6, seed=seed)).square().sum()
                gradients += torch.autograd.grad(loss, list(module.parameters()))
        found.append((gradients, state.state_dict(), state.calls, state.seen))
    assert found[0][2:] == found[1][2:] == found[2][2:] == (8, [8])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-12)


def test_spectral_normalisation_is_told_of_and_compared_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Net()
    nn.utils.parametrizations.spectral_norm(module.first)
    with pipelined(module) as run:
        run(data(8, 6))
    (record,) = caplog.records
    assert "_SpectralNorm._u` (in `first.parametrizations.weight.0`)" in record.getMessage()


# What a Trainer sees.


class Around(parity_models.Model):
    """Calls the layers of the split module, but not the module."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    build = Net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.decoder(self.net.encoder(x))


def test_a_step_around_the_split_module_is_refused_before_weights_change() -> None:
    model = Around()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PartitionError, match=r"`net.forward` was not called.*`module=\.\.\.`"):
        boring.trainer(PipelineStrategy(), 2).fit(model, datamodule=boring.Blobs(8))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(child._forward_pre_hooks for child in model.net.children())
    assert_trains = boring.trainer(PipelineStrategy(module=""), 2)
    assert_trains.fit(Around(), datamodule=boring.Blobs(8))


def test_a_split_module_that_is_never_called_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Never(Around):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.encoder(batch[0]).square().mean()

    boring.trainer(PipelineStrategy(), 2).fit(Never(), boring.Blobs(8).train_dataloader())
    assert "`net.forward` was never called in `training_step`" in caplog.text


def test_a_split_module_that_is_called_now_and_then_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sometimes(Around):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx % 2:
                return self.net(batch[0]).square().mean()
            return self.net.encoder(batch[0]).square().mean()

    boring.trainer(PipelineStrategy(), 2).fit(Sometimes(), boring.Blobs(8).train_dataloader())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_compiled_child_is_refused() -> None:
    model = Around()
    model.net = torch.compile(model.net, backend="eager")  # type: ignore[assignment]
    with pytest.raises(PartitionError, match="`net` is compiled as a whole"):
        boring.trainer(PipelineStrategy(), 2).fit(model, datamodule=boring.Blobs(8))


def test_lbfgs_keeps_its_history() -> None:
    class Quasi(parity_models.HalfFrozen):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    alone, split = Quasi(), Quasi()
    boring.trainer("auto", 1).fit(alone, boring.Blobs(16).train_dataloader())
    boring.trainer(PipelineStrategy(), 2).fit(split, boring.Blobs(16).train_dataloader())
    boring.assert_same_weights(alone, split)


def test_a_split_module_without_parameters_works() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Tanh(), nn.Softplus()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    class Pooled(parity_models.Model):
        def __init__(self) -> None:
            super().__init__()
            self.pool = Pool()

        def build(self) -> nn.Module:
            return nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.net(x))

    alone, split = Pooled(), Pooled()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(10))
    strategy = PipelineStrategy(module="pool")
    boring.trainer(strategy, 2).fit(split, datamodule=boring.Blobs(10))
    boring.assert_same_weights(alone, split)


def test_layers_of_the_lightning_module_itself_are_named() -> None:
    class Own(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 60).double(), nn.Linear(60, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    with pytest.raises(PartitionError, match='`module=""` is the LightningModule itself'):
        boring.trainer(PipelineStrategy(), 2).fit(Own(), datamodule=boring.Blobs(10))


def test_errors_of_kept_values_carry_a_hint() -> None:
    class Keeping(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            kept = []
            handle = self.net.encoder.register_forward_hook(lambda *args: kept.append(args[2]))
            logits = self.net(batch[0])
            handle.remove()
            return nn.functional.cross_entropy(logits, batch[1]) + kept[-1].square().mean()

    trainer = boring.trainer(PipelineStrategy(parity_check="off"), 2)
    with pytest.raises(RuntimeError, match="a second time") as raised:
        trainer.fit(Keeping(), boring.Blobs(8).train_dataloader())
    notes = getattr(raised.value, "__notes__", ["belong to one micro-batch"])
    assert any("belong to one micro-batch" in note for note in notes)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parity_check='on'\)`: use one of 'error', 'warn', 'off"):
        PipelineStrategy(parity_check="on")  # type: ignore[arg-type]


def test_nothing_is_said_of_models_that_are_right(caplog: pytest.LogCaptureFixture) -> None:
    for build in (*parity_models.MODELS[:3], parity_models.HalfFrozen):
        boring.trainer(PipelineStrategy(), 2).fit(build(), datamodule=boring.Blobs(10))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert_same(Net(), data(8, 6))


class Nested(parity_models.Model):
    """A model whose stages begin inside of its children."""

    build = staticmethod(
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)),
            nn.Sequential(nn.Tanh(), nn.Linear(8, 3)),
        )
    )


QUIET = {*parity_models.MODELS, Nested} - {parity_models.GradientPenalty}  # which is refused


@pytest.mark.parametrize(
    "kind", sorted(QUIET, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__
)
def test_right_results_are_not_warned_about(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {} if kind is not Nested else {"split_at": "0.2"}
    strategy = PipelineStrategy(**kinds)
    boring.trainer(strategy, 2, max_epochs=1).fit(kind(), boring.Blobs(8, 16))
    told = [r for r in caplog.records if r.name.startswith("lightning_mgpu") and r.levelno > 20]
    assert [record.getMessage() for record in told] == []
