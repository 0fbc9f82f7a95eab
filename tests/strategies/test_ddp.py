"""What `DDPStrategy` does in one process after another call: behaviour of the strategy itself."""

import os
import pickle
import random
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boring
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy as StockDDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, IterableDataset

from lightning_mgpu import DDPStrategy, PipelineDDPStrategy
from lightning_mgpu.launch.errors import LaunchError, UnpicklableError
from lightning_mgpu.launch.pool import default_pool
from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.launch.rank_variables import of_rank
from lightning_mgpu.strategies.ranks.launcher import PoolLauncher


def test_entry_points_in_any_order_repeatedly() -> None:
    model, data = boring.Classifier(), boring.Blobs()
    trainer = boring.trainer()
    pids = None
    for name in ("validate", "fit", "test", "predict", "fit", "validate", "predict"):
        result = getattr(trainer, name)(model, datamodule=data)
        if name in ("validate", "test"):
            assert set(result[0]) >= {"val_loss"} or set(result[0]) == {"test_loss"}
        if name == "predict":
            assert torch.equal(torch.cat(result), model(boring.blobs()[:][0]))
        assert not dist.is_initialized()
        pids = pids or default_pool().pids
        assert default_pool().pids == pids, "the workers were started again"


def test_trainers_one_after_another_share_the_workers() -> None:
    model = boring.Classifier()
    boring.trainer().fit(model, datamodule=boring.Blobs())
    pids = default_pool().pids
    boring.trainer(DDPStrategy(find_unused_parameters=True)).fit(model, datamodule=boring.Blobs())
    assert default_pool().pids == pids


@pytest.mark.parametrize("devices", [3, 2])
def test_large_weights_are_in_place_before_anything_runs(devices: int) -> None:
    """When fitting they travel apart from the rest, and on each rank `setup` may read them."""
    model = _LargeClassifier()
    trainer = boring.trainer(devices=devices)
    for run in (trainer.fit, trainer.fit, trainer.validate):
        model.expected = model.checksum()
        run(model, datamodule=boring.Blobs())


class _LargeClassifier(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.randn(2**19))
        self.tied = self.large
        self.expected = 0

    def checksum(self) -> int:
        return zlib.crc32(self.large.detach().numpy())

    def setup(self, stage: str) -> None:
        assert self.checksum() == self.expected
        assert self.tied is self.large

    def training_step(self, *args: Any) -> Any:
        return super().training_step(*args) + self.large.square().mean()


@pytest.mark.parametrize("devices", [3, 2, 1])
def test_device_counts(devices: int) -> None:
    model = _Worlds()
    boring.trainer(devices=devices).fit(model, datamodule=boring.Blobs())
    assert model.world == devices


class _Worlds(boring.Classifier):
    world = 0

    def on_train_start(self) -> None:
        ranks = self.all_gather(torch.tensor(self.global_rank))
        assert ranks.flatten().tolist() == list(range(self.trainer.world_size))
        assert (self.local_rank, self.trainer.node_rank) == (self.global_rank, 0)
        self.world = self.trainer.world_size


_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")


def _place() -> list[int]:
    return [int(os.environ.get(name, -1)) for name in _PLACE]


class _ByEnvironment(IterableDataset[Any]):
    """Takes its share of the data by environment variables, with the first row for its own."""

    def __init__(self, rank: str = "LOCAL_RANK") -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        rank, size = int(os.environ.get(self.rank, 0)), int(os.environ.get("WORLD_SIZE", 1))
        x, y = boring.blobs(16)[:]
        yield from ((x[i], y[i], i) for i in range(rank, 16, size))


class _Sees(boring.Classifier):
    """Keeps which samples each rank was given, and what place its environment gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.shares: list[list[int]] = []
        self.places: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += batch[2].tolist()
        return self._loss(batch)

    def on_train_end(self) -> None:
        self.shares = self.all_gather(torch.tensor(self.seen)).tolist()
        self.places = self.all_gather(torch.tensor(_place())).tolist()


@pytest.mark.parametrize(("rank", "num_workers"), [("LOCAL_RANK", 0), ("RANK", 1)])
def test_data_sharded_by_the_environment_is_shared_out(rank: str, num_workers: int) -> None:
    before = dict(os.environ)
    model = _Sees()
    loader = DataLoader(
        _ByEnvironment(rank), 4, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    boring.trainer().fit(model, loader)
    assert model.shares == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert model.places == [[0, 0, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0]]
    assert dict(os.environ) == before
    alone = _Sees()  # no worker process of the loader stays behind that has a share only
    boring.trainer("auto", 1).fit(alone, loader)
    assert alone.seen == list(range(16))


def test_environment_of_a_failed_run_is_put_back() -> None:
    class Fails(_Sees):
        def on_train_start(self) -> None:
            assert _place()[2] == 2
            raise ArithmeticError

    before = dict(os.environ)
    with pytest.raises(ArithmeticError):
        boring.trainer().fit(Fails(), DataLoader(_ByEnvironment(), 4))
    assert dict(os.environ) == before


def test_trainer_of_one_device_within_a_run_and_the_next_run_see_no_ranks_from_outside() -> None:
    class Nested(boring.Classifier):
        def on_train_end(self) -> None:
            inner = boring.Classifier()
            trainer = boring.trainer("auto", 1)
            trainer.fit(inner, datamodule=boring.Blobs())
            assert trainer.world_size == 1
            assert _place()[:3] == [self.global_rank, self.global_rank, 2]

    for _ in range(2):
        trainer = boring.trainer()
        trainer.fit(Nested(), datamodule=boring.Blobs())
        assert isinstance(trainer.strategy.launcher, PoolLauncher)


def test_program_started_within_a_run_launches_its_own_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It inherits the variables, as of a rank that somebody has started from outside."""
    with monkeypatch.context() as patched:
        for name, value in of_rank(Rank(0, 2)).items():
            patched.setenv(name, value)
        model = _Worlds()
        boring.trainer().fit(model, datamodule=boring.Blobs())
    assert model.world == 2


def test_dataloaders_given_by_hand_with_workers() -> None:
    loader = DataLoader(boring.blobs(), batch_size=4, num_workers=1, persistent_workers=True)
    model = boring.Classifier()
    trainer = boring.trainer()
    trainer.fit(model, loader, loader)
    trainer.fit(model, loader, loader)
    assert len(trainer.predict(model, loader)) == 12


def test_persistent_dataloader_iterator_stays_at_home() -> None:
    loader = DataLoader(boring.blobs(), batch_size=4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    trainer = boring.trainer(use_distributed_sampler=False)
    trainer.fit(boring.Classifier(), loader)


def test_callbacks_checkpoints_and_logger(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_last=True)
    stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = boring.trainer(
        callbacks=[checkpoint, stopping],
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="", version=""),
        max_epochs=5,
        log_every_n_steps=1,
    )
    model = boring.Classifier()
    trainer.fit(model, datamodule=boring.Blobs())
    assert stopping.stopped_epoch == 1
    assert checkpoint.best_model_score == trainer.callback_metrics["val_loss"]
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert "train_loss_step" in (tmp_path / "metrics.csv").read_text()


def test_checkpoint_resumes_exactly_with_us_and_without(tmp_path: Path) -> None:
    model = boring.Classifier("adam")
    trainer = boring.trainer(max_epochs=2, use_distributed_sampler=False)
    trainer.fit(model, datamodule=boring.Blobs(world_size=2))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    straight = boring.Classifier("adam")
    boring.trainer("auto", 1, max_epochs=3).fit(straight, datamodule=boring.Blobs(8))
    # Two processes of four samples a step are one process of eight.
    for strategy, devices, data in (
        ("mgpu_ddp", 2, boring.Blobs(4, world_size=2)),
        ("auto", 1, boring.Blobs(8)),
    ):
        resumed = boring.Classifier("adam")
        boring.trainer(strategy, devices, max_epochs=3, use_distributed_sampler=False).fit(
            resumed, datamodule=data, ckpt_path=tmp_path / "model.ckpt"
        )
        for name, value in straight.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-9)


class _Manual(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self._loss(batch))
        optimizer.step()


def test_manual_optimisation_equals_automatic() -> None:
    manual, automatic = _Manual(), boring.Classifier()
    boring.trainer().fit(manual, datamodule=boring.Blobs())
    boring.trainer().fit(automatic, datamodule=boring.Blobs())
    for name, value in automatic.state_dict().items():
        torch.testing.assert_close(manual.state_dict()[name], value, rtol=0, atol=1e-12)


def test_early_exit_of_a_tuner_callback_is_a_normal_end() -> None:
    model = boring.Classifier()
    model.lr = 0.1
    finder = LearningRateFinder(num_training_steps=5)
    finder._early_exit = True
    trainer = boring.trainer(callbacks=[finder])
    pids = default_pool().pids
    trainer.fit(model, datamodule=boring.Blobs())
    assert trainer.state.finished
    assert not pids or default_pool().pids == pids


def test_unseeded_ranks_draw_different_numbers() -> None:
    torch.seed()
    model = _Draws()
    boring.trainer().fit(model, datamodule=boring.Blobs())
    assert model.drawn[0] != model.drawn[1]


@pytest.mark.parametrize("seed", [np.random.seed, random.seed])
def test_seed_of_another_generator_alone_holds_for_all_ranks(seed: Any) -> None:
    """Otherwise ranks that split the data in `setup` train on each other's validation data."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    class Splits(_Draws):
        def setup(self, stage: str) -> None:
            self.split = [int(np.random.permutation(1000)[0]), random.randrange(1000)]

        def on_train_start(self) -> None:
            super().on_train_start()
            self.splits = self.all_gather(torch.tensor(self.split)).tolist()

    try:
        torch.seed()
        for _ in range(2):
            seed(1)
            expected = [int(np.random.permutation(1000)[0]), random.randrange(1000)]
            seed(1)
            model = Splits()
            boring.trainer().fit(model, datamodule=boring.Blobs())
            assert model.splits[0] == model.splits[1]
            assert model.splits[0][seed is random.seed] == expected[seed is random.seed]
            assert model.drawn[0] != model.drawn[1]
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def test_seeded_ranks_draw_the_same_numbers() -> None:
    model = _Draws()
    with patch.dict(os.environ):  # `seed_everything` leaves the seed there
        pl.seed_everything(3, verbose=False)
        boring.trainer().fit(model, datamodule=boring.Blobs())
    assert model.drawn[0] == model.drawn[1]


class _Draws(boring.Classifier):
    drawn: list[float]

    def on_train_start(self) -> None:
        self.drawn = self.all_gather(torch.rand(1)).flatten().tolist()


def test_predictions_of_all_ranks_come_in_dataset_order() -> None:
    model = boring.Classifier()
    batches = boring.trainer(devices=3).predict(model, datamodule=boring.Blobs(5, size=23))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(batches), model(boring.blobs(23)[:][0]))


def test_predictions_of_several_dataloaders() -> None:
    class Two(boring.Classifier):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"y": batch[1], "loader": torch.full_like(batch[1], dataloader_idx)}

    loaders = [DataLoader(boring.blobs(size), batch_size=4) for size in (10, 7)]
    first, second = boring.trainer().predict(Two(), loaders)
    assert torch.cat([batch["y"] for batch in first]).tolist() == [i % 3 for i in range(10)]
    assert torch.cat([batch["loader"] for batch in second]).tolist() == [1] * 7


def test_predictions_are_not_kept_when_not_wanted() -> None:
    trainer = boring.trainer()
    assert (
        trainer.predict(boring.Classifier(), datamodule=boring.Blobs(), return_predictions=False)
        is None
    )


def test_predictions_of_an_iterable_dataset_come_in_turns() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            rank = dist.get_rank()
            yield from ((torch.full((6,), rank, dtype=torch.float64), rank) for _ in range(4))

    class Labels(boring.Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch[1]

    batches = boring.trainer().predict(Labels(), DataLoader(Stream(), batch_size=2))
    assert [batch.tolist() for batch in batches] == [[0, 0], [1, 1], [0, 0], [1, 1]]


def test_registered_by_name_and_lazily_exported() -> None:
    assert type(boring.trainer("mgpu_ddp").strategy) is DDPStrategy
    assert isinstance(DDPStrategy(), StockDDPStrategy)


def test_trainer_and_strategy_pickle() -> None:
    trainer = boring.trainer()
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    assert type(pickle.loads(pickle.dumps(trainer)).strategy) is DDPStrategy


def test_custom_logger_writes_on_rank_zero_alone() -> None:
    class Memory(Logger):
        name = "memory"
        version = 0

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[dict[str, float]] = []

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            self.lines.append(metrics)

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    logger = Memory()
    boring.trainer(logger=logger, log_every_n_steps=1).fit(
        boring.Classifier(), datamodule=boring.Blobs()
    )
    assert sum("train_loss_step" in line for line in logger.lines) == 6
    assert any("val_loss" in line for line in logger.lines)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"LOCAL_RANK": "0"}, LightningEnvironment),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_JOB_NAME": "train",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1",
                "SLURM_NODEID": "0",
            },
            SLURMEnvironment,
        ),
    ],
)
def test_ranks_started_from_outside_are_left_alone(
    environment: dict[str, str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        strategy = boring.trainer().strategy
        assert isinstance(strategy, DDPStrategy)
        assert type(strategy.cluster_environment) is kind
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)
        assert strategy.global_rank == int(environment.get("SLURM_PROCID", 0))
    rank_zero_only.rank = 0  # Lightning has set it to the rank it found


def test_start_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start_method='spawn'.*has its own launcher"):
        boring.trainer(DDPStrategy(start_method="spawn"))


def test_several_nodes_need_an_external_launcher() -> None:
    with pytest.raises(MisconfigurationException, match=r"num_nodes=2.*torchrun --nnodes 2"):
        boring.trainer(num_nodes=2)


def test_foreign_process_group_is_refused(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    hook = sys.excepthook
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match="destroy_process_group"):
            boring.trainer().fit(boring.Classifier(), datamodule=boring.Blobs())
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def test_unpicklable_module_is_named_before_anything_starts() -> None:
    model = boring.Classifier()
    model.net.lock = threading.Lock()
    seen: list[str] = []

    class Watch(pl.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            seen.append("setup")

    with pytest.raises(UnpicklableError, match=r"`model\.net\.lock` cannot be pickled.*torchrun"):
        boring.trainer(callbacks=[Watch()]).fit(model, datamodule=boring.Blobs())
    assert not seen


def test_unpicklable_callback_is_named() -> None:
    class Holds(pl.Callback):
        def __init__(self) -> None:
            self.lock = threading.Lock()

    with pytest.raises(UnpicklableError, match=r"`trainer\.callbacks\[\d\]\.lock`"):
        boring.trainer(callbacks=[Holds()]).fit(boring.Classifier(), datamodule=boring.Blobs())


def test_unpicklable_is_no_matter_on_one_device() -> None:
    model = boring.Classifier()
    model.lock = threading.Lock()
    boring.trainer(devices=1).fit(model, datamodule=boring.Blobs())


_NOTEBOOK = """
import lightning_mgpu, lightning.pytorch as pl, torch
import boring

class Here(boring.Classifier):
    transform = staticmethod(lambda x: 2 * x)
    def forward(self, x):
        return self.transform(super().forward(x))

trainer = boring.trainer()
trainer.fit(Here(), datamodule=boring.Blobs())

class Here(boring.Classifier):  # the cell is run again, edited
    def forward(self, x):
        return 0 * super().forward(x)

model = Here()
print(torch.cat(trainer.predict(model, datamodule=boring.Blobs())).abs().sum().item())
"""


def test_notebook_like_driver_without_a_script() -> None:
    """Classes of ``__main__``, redefined between calls, in an interpreter that has no file."""
    done = subprocess.run(
        [sys.executable, "-i", "-q", "-c", "import sys; sys.ps1 = sys.ps2 = ''"],
        input=f"exec({_NOTEBOOK!r}, globals())\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.split()[-1:] == ["0.0"], done.stderr


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (DDPStrategy, {"cuda:0": "cuda:1"}),
        (PipelineDDPStrategy, {"cuda:0": "cuda:2", "cuda:1": "cuda:3"}),
    ],
)
def test_tensors_of_rank_zeros_devices_go_to_those_of_the_rank(
    strategy: Any, expected: dict[str, str]
) -> None:
    devices = [torch.device("cuda", index) for index in range(4)]
    launcher = PoolLauncher(None, strategy(parallel_devices=devices).devices_of)
    assert launcher._locations(1) == expected
