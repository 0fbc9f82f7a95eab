"""Programs in which stock DDP waits without a word: each ends soon, in a sentence that says why."""

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mgpu import DDPStrategy, PipelineDDPStrategy
from lightning_mgpu.launch.errors import RankHungError, WorkerDiedError

FAR = 60.0  # seconds; the collectives' own timeout is half an hour
SHORT = 2.0  # far more than ranks of a busy machine are apart

_Act = Callable[["Zoo"], Any]


class Zoo(boring.Classifier):
    """Does something in one hook, on one rank, at the third batch where there are batches."""

    def __init__(self, act: _Act, hook: str = "training_step", rank: int = 1) -> None:
        super().__init__()
        self.act, self.hook, self.rank = act, hook, rank
        self.accuracy = torchmetrics.MeanMetric()

    def _reached(self, hook: str, batch_idx: int = 2) -> None:
        if (hook, self.rank, batch_idx) == (self.hook, self.trainer.strategy.local_rank, 2):
            self.act(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._reached("training_step", batch_idx)
        self.accuracy.update(batch_idx)
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing that ranks wait for."""

    def on_train_epoch_end(self) -> None:
        self._reached("on_train_epoch_end")

    def on_fit_end(self) -> None:
        self._reached("on_fit_end")


def log(name: str) -> _Act:
    def act(model: Zoo) -> None:
        model.log(name, torch.tensor(1.0, dtype=torch.float64), sync_dist=True)

    return act


def stay(model: Zoo) -> None:
    time.sleep(600)


def wait_for_a_lock(model: Zoo) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def stop_early(model: Zoo) -> None:
    model.trainer.should_stop = True


def send(signum: signal.Signals) -> _Act:
    return lambda model: os.kill(os.getpid(), signum)


class Uneven(boring.Blobs):
    """A batch less on rank 1, by a sampler that Lightning does not replace."""

    def train_dataloader(self) -> DataLoader[Any]:
        size = 24 - 4 * self.trainer.global_rank
        return DataLoader(boring.blobs(size), batch_size=4)


class Sleepy(Dataset[Any]):
    """Its workers fall asleep on rank 1, where data comes from a mount that is gone."""

    def __init__(self, sleeps: bool) -> None:
        self.data: TensorDataset = boring.blobs()
        self.sleeps = sleeps

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.sleeps and index > 20:
            time.sleep(600)
        return self.data[index]


class SleepyBlobs(boring.Blobs):
    def train_dataloader(self) -> DataLoader[Any]:
        data = Sleepy(self.trainer.global_rank == 1)
        return DataLoader(data, batch_size=4, num_workers=1)


DIFFERENT = r"The ranks run different collectives: as number \d+, rank 0 runs .* and rank 1 "
UNEVEN = DIFFERENT + "|Rank 1 has ended, and will not come to"
LATE = r"waited more than 2 s for rank 1, at .*test_ddp_hangs.py:\d+ in "
slow = pytest.mark.slow

CASES = [
    pytest.param(Zoo(log("only")), boring.Blobs(), DIFFERENT, id="logged on one rank"),
    pytest.param(
        Zoo(lambda model: dist.barrier(), rank=0),
        boring.Blobs(),
        DIFFERENT,
        id="barrier on rank 0",
    ),
    pytest.param(
        Zoo(lambda model: model.accuracy.compute(), "on_train_epoch_end", 0),
        boring.Blobs(),
        UNEVEN,
        id="metric computed on rank 0",
        marks=slow,
    ),
    pytest.param(Zoo(stop_early), boring.Blobs(), UNEVEN, id="stopped on one rank", marks=slow),
    pytest.param(
        Zoo(lambda model: dist.barrier(), "on_fit_end", 0),
        boring.Blobs(),
        "Rank 1 has ended, and will not come to `barrier` of rank 0",
        id="ended",
    ),
    pytest.param(Zoo(int, "never"), Uneven(), UNEVEN, id="a batch less"),
    pytest.param(
        Zoo(wait_for_a_lock, rank=0),
        boring.Blobs(),
        r"for rank 0, at .* in `wait_for_a_lock`",
        id="lock",
    ),
    pytest.param(
        Zoo(int, "never"),
        SleepyBlobs(),
        r"for rank 1, at .*(?s:.*)in _try_get_data",
        id="DataLoader",
        marks=slow,
    ),
    pytest.param(
        Zoo(send(signal.SIGSTOP)), boring.Blobs(), "process of rank 1 is stopped", id="SIGSTOP"
    ),
]


def fit(model: pl.LightningModule, data: Any = None) -> pl.Trainer:
    trainer = boring.trainer(
        DDPStrategy(hang_timeout_s=SHORT), use_distributed_sampler=False, num_sanity_val_steps=0
    )
    trainer.fit(model, datamodule=data or boring.Blobs())
    return trainer


@pytest.mark.parametrize(("model", "data", "message"), CASES)
def test_hang_ends_in_a_sentence(model: Zoo, data: pl.LightningDataModule, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankHungError, match=message) as info:
        fit(model, data)
    assert time.monotonic() - started < FAR
    if "ended" not in message:
        assert "global step" in str(info.value)


def test_worker_that_gloo_ends_shows_its_stack() -> None:
    """It aborts a process that gets more bytes than it has room for."""

    def log_single(model: Zoo) -> None:
        model.log("only", torch.tensor(1.0), sync_dist=True)

    class Logs(Zoo):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, sync_dist=True)
            return loss

    with pytest.raises(WorkerDiedError, match="SIGABRT, as Gloo does it where") as info:
        fit(Logs(log_single))
    assert re.search(r"\nRank 0 .*`all_reduce`", str(info.value))
    assert "in log_single" in str(info.value)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


def fail(*_: Any) -> Any:
    raise ArithmeticError("on one rank")


def fail_in_backward(model: Zoo) -> None:
    model.net[2].bias.register_hook(fail)


def test_error_in_backward_of_one_rank_ends_all() -> None:
    with pytest.raises(ArithmeticError, match="on one rank"):
        fit(Zoo(fail_in_backward))


@slow
def test_sigterm_of_one_rank_ends_all() -> None:
    with pytest.raises(RuntimeError, match=r"Rank 1 raised .*SIGTERMException"):
        fit(Zoo(send(signal.SIGTERM)))


def test_slow_ranks_are_no_hang() -> None:
    """Slow ones by turns, each within the limit; and a long time in which nobody waits."""

    class Slow(boring.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_rank == batch_idx % 2 and batch_idx < 4:
                time.sleep(SHORT / 5)
            return self._loss(batch)

        def on_validation_start(self) -> None:
            dist.barrier()
            time.sleep(1.2 * SHORT)

    assert fit(Slow()).state.finished


def test_hang_in_pipelines_ends_in_a_sentence() -> None:
    strategy = PipelineDDPStrategy(stages=2, hang_timeout_s=SHORT)
    with pytest.raises(RankHungError, match=LATE + "`stay`"):
        boring.trainer(strategy, 4).fit(Zoo(stay), datamodule=boring.Blobs())


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"hang_timeout_s=.*more than 0"):
        DDPStrategy(hang_timeout_s=seconds)
