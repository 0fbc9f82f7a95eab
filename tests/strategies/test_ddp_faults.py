"""Faults in a Trainer's run under `DDPStrategy`: an error in seconds, never a hang."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import boring
import lightning.pytorch as pl
import psutil
import pytest
import torch
import torch.distributed as dist

from lightning_mgpu import DDPStrategy
from lightning_mgpu.launch.errors import LaunchError, RankHungError, WorkerDiedError
from lightning_mgpu.launch.pool import default_pool

FAR = 60.0  # seconds; the default timeout is half an hour


class Fault(boring.Classifier):
    """Does something at one rank's second training step."""

    def __init__(self, rank: int, kind: str) -> None:
        super().__init__()
        self.rank, self.kind = rank, kind

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_rank == self.rank and batch_idx == 1:
            getattr(self, self.kind)()
        return super().training_step(batch, batch_idx)

    def raise_error(self) -> None:
        raise ArithmeticError(f"rank {self.rank} cannot count")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep_forever(self) -> None:
        time.sleep(3600)

    def nested(self) -> None:
        boring.trainer().fit(boring.Classifier(), datamodule=boring.Blobs())


class Exceptions(pl.Callback):
    """Sees the exception as Lightning's callbacks do, when nothing may block any more."""

    seen: BaseException | None = None
    saved = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.seen = exception
        assert not dist.is_initialized()
        trainer.save_checkpoint("emergency.ckpt")
        self.saved = True


def _fit(model: pl.LightningModule, **strategy: Any) -> Exceptions:
    callback = Exceptions()
    started = time.monotonic()
    try:
        boring.trainer(DDPStrategy(**strategy), callbacks=[callback]).fit(
            model, datamodule=boring.Blobs()
        )
    finally:
        assert time.monotonic() - started < FAR
    return callback


@pytest.mark.parametrize("rank", [0, 1])
def test_exception_reaches_the_caller_from_any_rank(rank: int) -> None:
    with pytest.raises(ArithmeticError, match=f"rank {rank} cannot count") as raised:
        _fit(Fault(rank, "raise_error"))
    if rank == 1:
        assert "On rank 1" in str(raised.value.__cause__)
        assert "raise_error" in str(raised.value.__cause__)
    assert _recovers()


def test_callbacks_can_save_after_a_failure() -> None:
    callback = Exceptions()
    with pytest.raises(ArithmeticError):
        boring.trainer(callbacks=[callback]).fit(Fault(1, "raise_error"), datamodule=boring.Blobs())
    assert isinstance(callback.seen, ArithmeticError)
    assert callback.saved
    assert torch.load("emergency.ckpt", weights_only=True)["global_step"] >= 1


@pytest.mark.slow
def test_killed_worker_is_named() -> None:
    with pytest.raises(WorkerDiedError, match=r"Rank 1 died.*SIGKILL"):
        _fit(Fault(1, "die"))
    assert _recovers()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_hanging_rank_is_named_with_its_stack(rank: int) -> None:
    with pytest.raises(
        RankHungError, match=rf"(?s)more than .* s for rank {rank}, at .*sleep_forever"
    ):
        _fit(Fault(rank, "sleep_forever"), timeout=timedelta(seconds=3))
    assert _recovers()


@pytest.mark.slow
def test_trainer_inside_a_worker_is_refused() -> None:
    with pytest.raises(LaunchError, match="itself a worker"):
        _fit(Fault(1, "nested"))


def test_trainer_inside_rank_zero_is_refused() -> None:
    with pytest.raises(LaunchError, match="Another launch is running"):
        _fit(Fault(0, "nested"))


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_fit_end", "teardown"])
def test_exception_in_any_phase(hook: str) -> None:
    class Phase(boring.Classifier):
        pass

    def fail(self: pl.LightningModule, *_: Any, **__: Any) -> None:
        # Before `setup` there is no process group and so no `global_rank` to tell ranks apart.
        if self.trainer.strategy.local_rank == 1:
            raise ArithmeticError(f"in {hook}")

    if hook == "configure_optimizers":
        original = boring.Classifier.configure_optimizers

        def configure(self: Any) -> Any:
            fail(self)
            return original(self)

        Phase.configure_optimizers = configure  # type: ignore[method-assign]
    else:
        setattr(Phase, hook, fail)
    with pytest.raises(ArithmeticError, match=f"in {hook}"):
        _fit(Phase())


def test_failure_leaves_no_worker() -> None:
    pids = default_pool().pids
    with pytest.raises(ArithmeticError):
        _fit(Fault(1, "raise_error"))
    assert not default_pool().pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _recovers() -> bool:
    trainer = boring.trainer()
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    return bool(trainer.state.finished)


class Unused(boring.Classifier):
    """Has a layer that gets no gradient, which DDP refuses at the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = torch.nn.Linear(2, 2)


def test_data_and_model_can_be_used_again_after_ddp_has_failed() -> None:
    data, model = boring.Blobs(8, 32), Unused()
    with pytest.raises(RuntimeError, match="find_unused_parameters"):
        boring.trainer("mgpu_ddp", 2).fit(model, datamodule=data)
    assert "forward" not in vars(model) or model.forward.__name__ == "forward"
    boring.trainer("mgpu_ddp", 2).fit(boring.Classifier(), datamodule=data)
    boring.trainer("auto", 1).validate(model, datamodule=data)
