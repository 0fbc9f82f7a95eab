"""Training that goes on when a rank's process is lost."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mgpu import DDPStrategy, PipelineDDPStrategy
from lightning_mgpu.launch.errors import WorkerDiedError

EPOCHS, BATCHES = 3, 6


class Dropping(boring.Classifier):
    """Draws random numbers in each step, and for the order of samples."""

    def __init__(self) -> None:
        super().__init__("adam", scheduler=True)
        self.net.insert(1, nn.Dropout(0.5))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(boring.blobs(2 * 4 * BATCHES), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(boring.blobs(16), batch_size=4)


class Killer(pl.Callback):
    """Kills rank 1 the first times that it comes to certain steps.

    Args:
        directory: Where it is noted that it has.
        when: Names of hooks, with the number of optimizer steps before.
    """

    def __init__(self, directory: Path, when: list[tuple[str, int]]) -> None:
        self.directory, self.when = directory, when

    def _come_to(self, hook: str, trainer: pl.Trainer) -> None:
        noted = self.directory / f"{hook}-{trainer.global_step}"
        if trainer.global_rank != 1 or (hook, trainer.global_step) not in self.when:
            return
        if not noted.exists():
            noted.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._come_to("batch", trainer)

    def on_after_backward(self, trainer: Any, *_: Any) -> None:
        self._come_to("backward", trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._come_to("validation", trainer)


def _end(trainer: pl.Trainer, model: pl.LightningModule) -> str:
    """A digest of weights, optimizer state and what was logged last."""
    found = hashlib.sha256()
    state = [p for group in trainer.optimizers[0].state.values() for p in group.values()]
    logged = [trainer.callback_metrics[name] for name in sorted(trainer.callback_metrics)]
    for tensor in [*model.state_dict().values(), *state, *logged]:
        found.update(torch.as_tensor(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def _train(strategy: Any, killer: Killer, tmp_path: Path, devices: int = 2) -> tuple[Any, Any]:
    torch.manual_seed(3)
    model = Dropping()
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=4)
    trainer = boring.trainer(
        strategy, devices, max_epochs=EPOCHS, callbacks=[killer, saving], enable_checkpointing=True
    )
    trainer.fit(model)
    return trainer, model


@pytest.mark.parametrize(
    ("every", "when"),
    [
        pytest.param(1, [("batch", 4)], marks=pytest.mark.slow),
        (6, [("backward", 7), ("validation", 12)]),
        pytest.param(100, [("backward", 2)], marks=pytest.mark.slow),
    ],
)
def test_run_ends_with_the_bits_of_one_that_lost_nobody(
    every: int, when: list[tuple[str, int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, model = _train(
        DDPStrategy(max_failures=2, snapshot_every_n_steps=every),
        Killer(tmp_path, when),
        tmp_path / "first",
    )
    assert trainer.global_step == EPOCHS * BATCHES
    told = [message for message in boring.told(caplog) if "Rank 1 died" in message]
    assert len(told) == len(when)
    assert "goes on from step" in told[0]
    expected = _train(DDPStrategy(), Killer(tmp_path, []), tmp_path / "second")
    assert _end(trainer, model) == _end(*expected)
    assert not list(Path("/dev/shm").glob("lightning_mgpu_*"))
    # The Trainer's own callbacks are those that it was given.
    assert [type(each).__name__ for each in trainer.callbacks] == [
        type(each).__name__ for each in expected[0].callbacks
    ]


@pytest.mark.slow
def test_pipelines_in_several_processes_go_on(tmp_path: Path) -> None:
    options = {"stages": 2, "module": "net", "parity_check": "off"}
    trainer, model = _train(
        PipelineDDPStrategy(max_failures=1, snapshot_every_n_steps=3, **options),
        Killer(tmp_path, [("backward", 8)]),
        tmp_path / "first",
        devices=4,
    )
    expected = _train(PipelineDDPStrategy(**options), Killer(tmp_path, []), tmp_path, devices=4)
    assert _end(trainer, model) == _end(*expected)


def test_one_failure_too_many_is_an_error(tmp_path: Path) -> None:
    when = [("batch", 2), ("batch", 5)]
    with pytest.raises(WorkerDiedError, match="Rank 1 died"):
        _train(
            DDPStrategy(max_failures=1, snapshot_every_n_steps=2), Killer(tmp_path, when), tmp_path
        )
    assert len(list(tmp_path.glob("batch-*"))) == 2


class Full(TorchCheckpointIO):
    """Of a disk that is full at step 4."""

    def save_checkpoint(self, checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "step-4" in str(path):
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")
        super().save_checkpoint(checkpoint, path, *args, **kwargs)


@pytest.mark.slow
def test_snapshot_that_cannot_be_written_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on, and from the one before if a rank is lost."""
    trainer, _ = _train(
        DDPStrategy(max_failures=1, snapshot_every_n_steps=2, checkpoint_io=Full()),
        Killer(tmp_path, [("backward", 5)]),
        tmp_path / "first",
    )
    assert trainer.global_step == EPOCHS * BATCHES
    first, second, *_ = boring.told(caplog)
    assert "could not be written: PytorchStreamWriter" in first
    assert "goes on from step 2" in second


class Raises(Dropping):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and self.global_step == 3:
            raise RuntimeError("mine")
        return super().training_step(batch, batch_idx)


def test_an_exception_is_no_loss() -> None:
    with pytest.raises(RuntimeError, match="mine"):
        boring.trainer(DDPStrategy(max_failures=3), 2, max_epochs=2).fit(Raises())


@pytest.mark.parametrize(
    "options", [{"max_failures": -1}, {"max_failures": "3"}, {"snapshot_every_n_steps": 0}]
)
def test_numbers_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DDPStrategy(**options)
