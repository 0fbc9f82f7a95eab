"""What goes wrong in a stage, and what is refused."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import boring
import parity_models
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mgpu import PipelineStrategy
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError


class Fault(Exception):
    """Of the user's own."""


class Breaking(nn.Module):
    """Breaks on the micro-batch that holds the mark."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward" and self.training and float(x.detach().max()) > 900:
            raise Fault("in forward")  # the user's line
        return _BreakingBackward.apply(x) if self.where == "backward" else x


class _BreakingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.breaks = bool(x.max() > 900)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.breaks:
            raise Fault("in backward")  # the user's line
        return gradient


class Model(parity_models.Model):
    """Step 1's micro-batch 2 of 4 bears a mark that reaches the broken layer."""

    stage, where = 0, "forward"

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Identity(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6)]
        layers += [nn.Identity(), nn.Linear(6, 3)]
        layers[0 if self.stage == 0 else 3] = Breaking(self.where)
        return nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        if batch_idx == 1 and self.marked:
            x = x + 0
            if self.stage == 0:
                x.data[5] = 1000.0
            else:
                self.net[2].weight.data.fill_(1e4)
        return nn.functional.cross_entropy(self.net(x), batch[1])

    marked = True


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_error_of_a_stage(where: str, checkpoint: Any) -> None:
    class Here(Model):
        pass

    Here.where = where
    model = Here()
    trainer = _trainer(checkpoint=checkpoint)
    with pytest.raises(Fault, match=f"in {where}") as raised:
        trainer.fit(model, boring.Blobs(8).train_dataloader())
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert any("# the user's line" in (frame.line or "") for frame in frames)
    notes = " ".join(getattr(raised.value, "__notes__", [str(raised.value.__cause__)]))
    assert "stage 0 of 2 on cpu, micro-batch 2 of 4" in notes
    assert ("in backward" in notes) == (where == "backward")
    assert not [t for t in threading.enumerate() if t.name.startswith("mgpu-worker")]
    assert "forward" not in vars(model.net)
    # Step 0 counts, the broken step does not, if it broke before its forward was over.
    assert model.net[1].num_batches_tracked == (1 if where == "forward" else 2)
    assert model.net[1].momentum == 0.1
    # And the next run works.
    model.marked = False
    _trainer(checkpoint=checkpoint).fit(model, boring.Blobs(8).train_dataloader())


def test_error_of_the_second_stage_names_it() -> None:
    class Here(Model):
        stage = 1

    with pytest.raises(Fault) as raised:
        _trainer().fit(Here(), boring.Blobs(8).train_dataloader())
    notes = " ".join(getattr(raised.value, "__notes__", [str(raised.value.__cause__)]))
    assert "stage 1 of 2 on cpu, micro-batch 0 of 4" in notes


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_error_of_a_later_stage_on_a_device_names_it(where: str) -> None:
    class Here(Model):
        stage = 1

    Here.where = where
    with pytest.raises(Fault) as raised:
        _trainer(stages_per_device=2, balance=[1, 1, 1, 2]).fit(
            Here(), boring.Blobs(8).train_dataloader()
        )
    notes = " ".join(getattr(raised.value, "__notes__", [str(raised.value.__cause__)]))
    assert "stage 3 of 4 on cpu, micro-batch" in notes
    assert not [t for t in threading.enumerate() if t.name.startswith("mgpu-worker")]


def test_error_between_layers_names_the_line() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x.view(-1, 7)  # the line at fault
            return self.second(x)

    class Reshaping(parity_models.Model):
        build = Net

    with pytest.raises(RuntimeError, match="shape") as raised:
        _trainer().fit(Reshaping(), boring.Blobs(8).train_dataloader())
    text = "".join(traceback.format_exception(raised.value))
    assert "# the line at fault" in text
    assert "raised in stage 0 of 2 on cpu, micro-batch" in text


def test_gradients_of_a_broken_backward_are_dropped() -> None:
    class Recovering(Model):
        where = "backward"

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.caught = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for marked in (True, False):
                self.marked = marked
                loss = super().training_step(batch, 1)
                self.zero_grad()
                if marked:
                    with pytest.raises(Fault):
                        self.manual_backward(loss)
                    self.caught += 1
                else:
                    self.manual_backward(loss)
            x = batch[0].clone()
            expected = torch.autograd.grad(
                nn.functional.cross_entropy(plain(x), batch[1]), list(plain.parameters())
            )
            for parameter, gradient in zip(self.net.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-9)

    model = Recovering()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Model().build().double()
    plain[1] = model.net[1] = nn.Identity()
    _trainer(max_steps=-1).fit(model, boring.Blobs(8).train_dataloader())
    assert model.caught == 6


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_interrupt_while_stages_are_busy(where: str) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Sleep.apply(x, where)

    class Interrupted(parity_models.Model):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 6), Slow(), nn.Linear(6, 3))

    busy.clear()
    model = Interrupted()
    killer = threading.Thread(target=_interrupt_when_busy)
    killer.start()
    with pytest.raises(SystemExit):
        _trainer().fit(model, boring.Blobs(8).train_dataloader())
    took = time.monotonic() - interrupted_at[0]
    killer.join()
    assert took < 1.0
    assert "forward" not in vars(model.net)


busy = threading.Event()
interrupted_at = [0.0]


def _interrupt_when_busy() -> None:
    assert busy.wait(30)
    interrupted_at[0] = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
        ctx.where = where
        if where == "forward" and x.requires_grad:
            _sleep()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.where == "backward":
            _sleep()
        return gradient, None


def _sleep() -> None:
    busy.set()
    for _ in range(3000):
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _sigint() -> Any:
    # Lightning ignores the signal once it has seen it.
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# What is refused.


def _sequential(*layers: nn.Module) -> Callable[[], parity_models.Model]:
    class Some(parity_models.Model):
        def build(self) -> nn.Module:
            return nn.Sequential(*layers)

    return Some


@pytest.mark.parametrize("shared_with", ["stage", "output", "caller"])
def test_writing_in_place_to_what_others_use_is_right_or_refused(shared_with: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 3)
            self.relu = nn.ReLU(inplace=True)
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            if shared_with == "caller":
                return self.last(self.relu(hidden + self.relu(x)[:, :3]))
            active = self.relu(hidden)
            if shared_with == "output":
                return self.last(active), hidden
            return self.last(active) + hidden

    class Model(parity_models.Model):
        build = Net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            output = self.net((batch[0] * 1).requires_grad_())
            return output[0].sum() if isinstance(output, tuple) else output.sum()

    splits = ["net.relu", "net.last"] if shared_with == "stage" else ["net.relu"]
    trainer, model = _trainer(len(splits) + 1, split_at=splits), Model()
    if shared_with == "caller":
        with pytest.raises(RuntimeError, match=r"modifies its argument `.*` in place"):
            trainer.fit(model, boring.Blobs(8).train_dataloader())
        return
    trainer.fit(model, boring.Blobs(8).train_dataloader())
    alone = Model()
    boring.trainer("auto", 1, max_steps=3).fit(alone, boring.Blobs(8).train_dataloader())
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "sometimes"}, "use one of 'never', 'except_last', 'always'"),
        (
            {"defer_weight_gradients": "late"},
            r"`PipelineStrategy\(defer_weight_gradients='late'\)`: use one of True, False, 'auto'",
        ),
        ({"stages_per_device": 0}, r"`PipelineStrategy\(stages_per_device=0\)`: give a number"),
        ({"stages_per_device": "many"}, r"stages_per_device='many'\)`: .* at least 1, or 'auto'"),
        (
            {"stages_per_device": "auto", "split_at": "net.1"},
            r"\(stages_per_device='auto', split_at='net.1'\)`: `split_at` says how many stages",
        ),
        (
            {"stages_per_device": "auto", "balance": [1, 1]},
            r"\(stages_per_device='auto', balance=\[1, 1\]\)`: `balance` says how many stages",
        ),
        ({"chunks": 0}, r"`PipelineStrategy\(chunks=0\)`: give a number"),
        ({"chunks": "many"}, r"`PipelineStrategy\(chunks='many'\)`: give a number"),
        ({"balance": "size"}, "use one of 'parameters', 'time', 'memory', 'auto', or a list"),
        ({"balance": [3, 0]}, "each stage needs at least one layer"),
        ({"balance": [1, 1], "split_at": "net.1"}, "both say where to cut; leave one out"),
        ({"split_args": "x", "broadcast_args": ["x"]}, "both name"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStrategy(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "nett"}, "`Classifier` has no submodule of that name. It has `net`"),
        ({"split_at": "net.7"}, "`Sequential` has no submodule `7`"),
        ({"split_args": ["input_ids"]}, "`split_args` has 'input_ids', but `forward` takes input"),
    ],
)
def test_wrong_names_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    class Untouched(boring.Classifier):
        def on_fit_start(self) -> None:
            raise AssertionError("too late")

    with pytest.raises(ValueError, match=message):
        _trainer(**options).fit(boring.Classifier(), boring.Blobs(8).train_dataloader())


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PartitionError, match=r"has 3 layers.*too few for 4 stages"):
        _trainer(4).fit(boring.Classifier(), boring.Blobs(8).train_dataloader())


def test_tied_weights_are_those_of_one_device() -> None:
    def build() -> parity_models.Model:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first, second = nn.Linear(6, 6), nn.Linear(6, 6)
            second.weight = first.weight
            return _sequential(first, second, nn.Linear(6, 3))()

    split, alone = build(), build()
    _trainer(split_at="net.1").fit(split, boring.Blobs(8).train_dataloader())
    assert split.net[0].weight is split.net[1].weight
    boring.trainer("auto", 1, max_steps=3).fit(alone, boring.Blobs(8).train_dataloader())
    torch.testing.assert_close(split.state_dict(), alone.state_dict(), rtol=0, atol=1e-12)


def test_compiled_and_synchronised_modules_are_refused() -> None:
    model = boring.Classifier()
    model.net.compile()
    with pytest.raises(PartitionError, match="`net` is compiled as a whole"):
        _trainer().fit(model, boring.Blobs(8).train_dataloader())
    layers = (nn.Linear(6, 6), nn.SyncBatchNorm(6), nn.Linear(6, 3))
    with pytest.raises(MisconfigurationException, match="is a `SyncBatchNorm`"):
        _trainer().fit(_sequential(*layers)(), boring.Blobs(8).train_dataloader())
    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True"):
        boring.trainer(PipelineStrategy(), 2, sync_batchnorm=True).fit(
            boring.Classifier(), boring.Blobs(8).train_dataloader()
        )


def test_several_nodes_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="this strategy runs in one process"):
        boring.trainer("pipeline", 2, num_nodes=2)


def _trainer(devices: int = 2, max_steps: int = 3, **options: Any) -> Any:
    options.setdefault("chunks", 4)
    return boring.trainer(
        PipelineStrategy(**options), devices, max_steps=max_steps, num_sanity_val_steps=0
    )
