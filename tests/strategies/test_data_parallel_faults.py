"""Errors, interrupts and refusals of `dp`."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mgpu import DataParallelStrategy


class Failing(boring.Classifier):
    """Fails on the shard whose first label is 2, and counts what the other shard still does."""

    where = "forward"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()
        self.waited = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.norm(batch[0])
        if batch[1][0] == 2:
            if self.where == "forward":
                raise KeyError("broken sample")
            x = Broken.apply(x.requires_grad_())
        return self._loss((x, batch[1]))


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ArithmeticError("broken gradient")


def _notes(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", [])) + str(error.__cause__)


def test_error_in_a_step_names_replica_and_shard() -> None:
    model = Failing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="broken sample") as caught:
        boring.trainer("dp", 2).fit(model, boring.Blobs(4, 4))  # labels 0 1 | 2 0
    assert "replica 1 of 2 on cpu, samples 2 to 3 of the batch" in _notes(caught.value)
    frames = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert frames[-1] == "training_step"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_error_in_backward_names_replica_and_shard() -> None:
    model = Failing()
    model.where = "backward"
    with pytest.raises(ArithmeticError, match="broken gradient") as caught:
        boring.trainer("dp", 2).fit(model, boring.Blobs(4, 4))
    assert "replica 1 of 2 on cpu, samples 2 to 3 of the batch, in backward" in _notes(caught.value)


def test_other_replicas_stop_after_an_error() -> None:
    started = threading.Event()
    turns = [0]

    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch[1][0] == 2:
                started.wait(60)
                raise KeyError("broken sample")
            started.set()
            while True:  # would never end by itself
                turns[0] += 1

    strategy = DataParallelStrategy(parity_check="off")  # which has no other replica to wait for
    with pytest.raises(KeyError, match="broken sample"):
        boring.trainer(strategy, 2).fit(Model(), boring.Blobs(4, 4))
    after = turns[0]
    time.sleep(0.05)
    assert turns[0] == after


def test_training_goes_on_after_an_error() -> None:
    class Model(boring.Classifier):
        fail = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fail and batch_idx == 1:
                raise KeyError("broken sample")
            return super().training_step(batch, batch_idx)

    strategy = DataParallelStrategy()
    model = Model()
    with pytest.raises(KeyError, match="broken sample"):
        boring.trainer(strategy, 2).fit(model, boring.Blobs())
    model.fail = False
    expected = boring.Classifier()
    expected.load_state_dict(model.state_dict())
    boring.trainer(strategy, 2).fit(model, boring.Blobs())
    boring.trainer("auto", 1).fit(expected, boring.Blobs())
    boring.assert_same_weights(expected, model)


def test_exit_in_a_step_ends_the_program_as_usual() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            sys.exit(3)

    with pytest.raises(SystemExit, match="3"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


_INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
import boring, lightning_mgpu, time

class Model(boring.Classifier):
    def training_step(self, batch, batch_idx):
        print("busy", flush=True)
        {work}

boring.trainer("dp", 2).fit(Model(), boring.Blobs())
"""


@pytest.mark.parametrize(
    "work", ["while True: pass", "time.sleep(600)"], ids=["busy loop", "blocking call"]
)
def test_ctrl_c_ends_a_step(work: str) -> None:
    script = _INTERRUPTED.format(tests=os.path.dirname(boring.__file__), work=work)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while "busy" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # No deadline of ours: what hangs runs into this one.
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt, attempting graceful shutdown" in out + err
    assert process.returncode == 1, err  # as Lightning ends an interrupted program


# Refusals


class SyncNormalised(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(6)


class Lazy(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(3)


class Scripted(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Linear(6, 3))


class Fetching(boring.Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError("must not be called")


class FetchingInValidation(boring.Classifier):
    def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        raise AssertionError("must not be called")


class CompiledInPlace(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (SyncNormalised, "`norm` is a `SyncBatchNorm`"),
        (Lazy, "`lazy` has parameters without a shape yet"),
        (Scripted, "`scripted` is compiled by TorchScript"),
        (Fetching, r"training_step\(dataloader_iter\)"),
        (FetchingInValidation, r"validation_step\(dataloader_iter\)"),
        (CompiledInPlace, "`CompiledInPlace` is compiled as a whole"),
    ],
    ids=["sync", "lazy", "scripted", "dataloader_iter", "in validation", "compiled in place"],
)
def test_modules_that_cannot_be_replicated_are_refused(build: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        boring.trainer("dp", 2).fit(build(), boring.Blobs())


def test_compiled_module_is_refused() -> None:
    compiled: Any = torch.compile(boring.Classifier(), backend="eager")
    with pytest.raises(RuntimeError, match="Using a compiled model is incompatible"):
        boring.trainer("dp", 2).fit(compiled, boring.Blobs())


def test_trainer_arguments_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"num_nodes=2.*one process.*strategy='mgpu_ddp'"
    ):
        boring.trainer("dp", 2, num_nodes=2)
    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True"):
        boring.trainer("dp", 2, sync_batchnorm=True).fit(boring.Classifier(), boring.Blobs())
    for name, value in {
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        **{"TORCHELASTIC_RUN_ID": "none"},
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MisconfigurationException, match="in one of 2 processes"):
        boring.trainer("dp", 2)


def test_the_other_namespace_is_named() -> None:
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(ValueError, match=r"for the Trainer of `lightning\.pytorch`"):
        other.Trainer(strategy=DataParallelStrategy(), accelerator="cpu", devices=2)


def test_double_backward_outside_the_step_is_refused() -> None:
    class Model(boring.Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(create_graph=True)

    with pytest.raises(RuntimeError, match=r"create_graph=True.*Compute them inside the step"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_second_backward_raises_as_torch_does() -> None:
    class Model(boring.Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()
            loss.backward()

    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_backward_twice_with_the_graph_retained() -> None:
    class Model(boring.Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(retain_graph=True)
            loss.backward()

    alone, parallel = Model(), Model()
    boring.trainer("auto", 1).fit(alone, boring.Blobs())
    boring.trainer("dp", 2).fit(parallel, boring.Blobs())
    boring.assert_same_weights(alone, parallel)


def test_loss_that_is_no_tensor_is_refused() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0.5

    with pytest.raises(TypeError, match=r"`training_step` must return a tensor.*returned float"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_loss_that_is_no_scalar_is_refused() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum(1)

    with pytest.raises(ValueError, match=r"scalar loss; its shape is \(2,\)"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_parameters_written_to_in_a_step_are_named() -> None:
    class Model(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net[2].bias.mul_(0.9)
            return loss

    with pytest.raises(RuntimeError, match=r"writes to the parameter `net\.2\.bias` in place"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_layers_of_another_replica_are_refused() -> None:
    holder: list[nn.Module] = []

    class Model(boring.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6).double()
            holder[:] = [self.norm]

        def forward(self, x: Tensor) -> Tensor:
            return self.net(holder[0](x))  # a global, which no copy has of its own

    with pytest.raises(RuntimeError, match="`BatchNorm1d` of one replica is called in the step of"):
        boring.trainer("dp", 2).fit(Model(), boring.Blobs())


def test_frozen_model_raises_as_torch_does() -> None:
    model: pl.LightningModule = boring.Classifier()
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        boring.trainer("dp", 2).fit(model, boring.Blobs())
