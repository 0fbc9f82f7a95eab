"""Training that loses its workers and goes on."""

import os
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.ray import RayStrategy, close

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class _Dies(pl.Callback):
    """Kills rank 1 in the middle of an epoch, once for each file it can take away."""

    def __init__(self, tickets: Path) -> None:
        self.tickets = tickets

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.current_epoch == 2 and trainer.global_rank == 1:
            for ticket in self.tickets.iterdir():
                ticket.unlink()
                os.kill(os.getpid(), 9)


class _Scheduled(boring.Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def _fit(
    path: Path, deaths: int, max_failures: int, storage_path: str | None = None
) -> tuple[pl.Trainer, boring.Classifier]:
    tickets = path / "tickets"
    tickets.mkdir(parents=True)
    for number in range(deaths):
        (tickets / str(number)).touch()
    callbacks = [
        _Dies(tickets),
        ModelCheckpoint(path / "checkpoints", monitor="val_loss"),
        EarlyStopping("val_loss", patience=3),
    ]
    model = _Scheduled()
    strategy = RayStrategy(num_workers=2, max_failures=max_failures, storage_path=storage_path)
    trainer = boring.trainer(
        strategy, "auto", callbacks=callbacks, enable_checkpointing=True, max_epochs=4
    )
    trainer.fit(model, datamodule=boring.Blobs())  # shuffled, by epoch
    return trainer, model


def test_killed_worker_recovers_to_the_same_result(tmp_path: Path) -> None:
    expected, straight = _fit(tmp_path / "straight", deaths=0, max_failures=0)
    trainer, model = _fit(tmp_path / "killed", deaths=1, max_failures=1)
    boring.assert_same_weights(straight, model)
    theirs = dict(expected.callback_metrics)
    torch.testing.assert_close(dict(trainer.callback_metrics), theirs, rtol=0, atol=1e-9)
    assert (trainer.current_epoch, trainer.global_step) == (4, expected.global_step)
    ours, other = trainer.checkpoint_callback, expected.checkpoint_callback
    assert float(ours.best_model_score) == pytest.approx(float(other.best_model_score), abs=1e-9)
    assert Path(ours.best_model_path).name == Path(other.best_model_path).name
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


def test_one_failure_too_many_leaves_the_state_in_storage(tmp_path: Path) -> None:
    expected, straight = _fit(tmp_path / "straight", deaths=0, max_failures=0)
    with pytest.raises(WorkerDiedError, match="Rank 1 died"):
        _fit(tmp_path / "killed", deaths=2, max_failures=1, storage_path="storage")
    (directory,) = (tmp_path / "storage").iterdir()
    assert {path.name for path in directory.iterdir()} == {"latest", "epoch=1-step=12.ckpt"}
    trainer = boring.trainer(RayStrategy(num_workers=2, storage_path="other"), "auto", max_epochs=4)
    model = _Scheduled()
    trainer.fit(model, datamodule=boring.Blobs(), ckpt_path=directory / "epoch=1-step=12.ckpt")
    boring.assert_same_weights(straight, model)
    assert trainer.global_step == expected.global_step
    assert list((tmp_path / "other").iterdir()) == [], "nobody needs it when training is done"
    close()


def test_number_of_failures_is_checked() -> None:
    with pytest.raises(ValueError, match=r"max_failures=-1"):
        RayStrategy(max_failures=-1)
