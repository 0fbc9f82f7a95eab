"""What `RayStrategy` does in one call after another, on one Ray instance."""

import os
import threading
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import ray
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_mgpu.launch.errors import LaunchError, UnpicklableError, WorkerDiedError
from lightning_mgpu.ray import RayStrategy, close, cluster, keep_warm, worker_group

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def _trainer(num_workers: int = 2, **kwargs: Any) -> pl.Trainer:
    return boring.trainer(RayStrategy(num_workers=num_workers), "auto", **kwargs)


def test_entry_points_in_any_order_repeatedly() -> None:
    model, data = boring.Classifier(), boring.Blobs()
    trainer = _trainer()
    warm: Any = None
    for name in ("validate", "fit", "test", "predict", "fit", "validate", "predict"):
        result = getattr(trainer, name)(model, datamodule=data)
        if name in ("validate", "test"):
            assert set(result[0]) & {"val_loss", "test_loss"}
        if name == "predict":
            torch.testing.assert_close(torch.cat(result), model(boring.blobs()[:][0]))
        assert trainer.state.finished
        assert trainer.state.fn.value == name
        warm = warm or worker_group._groups[0]
        assert worker_group._groups == [warm], "the workers were started again"


def test_everything_returns_as_ddp_leaves_it(tmp_path: Path) -> None:
    kwargs: Any = {"max_epochs": 3, "use_distributed_sampler": False, "enable_checkpointing": True}
    runs = {}
    for name in ("ours", "ddp"):
        model = boring.Classifier("adam", scheduler=True)
        callbacks = [
            ModelCheckpoint(tmp_path / name, monitor="val_loss", save_last=True),
            EarlyStopping("val_loss", patience=2),
        ]
        make = _trainer if name == "ours" else boring.trainer
        trainer = make(callbacks=callbacks, **kwargs)
        trainer.fit(model, datamodule=boring.Blobs(world_size=2))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        runs[name] = model, trainer, torch.load(tmp_path / f"{name}.ckpt", weights_only=False)
    (model, trainer, ours), (other, stock, ddp) = runs["ours"], runs["ddp"]
    boring.assert_same_weights(model, other)
    for kind in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        theirs = dict(getattr(stock, kind))
        torch.testing.assert_close(dict(getattr(trainer, kind)), theirs, rtol=0, atol=1e-9)
    assert ours["loops"] == ddp["loops"]
    assert (trainer.current_epoch, trainer.global_step) == (3, stock.global_step)
    torch.testing.assert_close(ours["optimizer_states"], ddp["optimizer_states"])
    assert ours["lr_schedulers"][0]["last_epoch"] == ddp["lr_schedulers"][0]["last_epoch"]
    checkpoint, expected = trainer.checkpoint_callback, stock.checkpoint_callback
    assert Path(checkpoint.best_model_path).name == Path(expected.best_model_path).name
    assert float(checkpoint.best_model_score) == pytest.approx(float(expected.best_model_score))
    assert Path(checkpoint.last_model_path).exists()
    assert trainer.early_stopping_callback.wait_count == stock.early_stopping_callback.wait_count
    parameters = trainer.optimizers[0].param_groups[0]["params"]
    assert parameters[0] is model.net[0].weight
    trainer.test(model, datamodule=boring.Blobs(), ckpt_path="best")


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    straight, halves = boring.Classifier("adam"), boring.Classifier("adam")
    data = boring.Blobs(world_size=2)
    _trainer(max_epochs=2, use_distributed_sampler=False).fit(straight, datamodule=data)
    first = _trainer(max_epochs=1, use_distributed_sampler=False)
    first.fit(halves, datamodule=data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = _trainer(max_epochs=2, use_distributed_sampler=False)
    resumed.fit(boring.Classifier("adam"), datamodule=data, ckpt_path=tmp_path / "half.ckpt")
    boring.assert_same_weights(straight, resumed.lightning_module)


def test_epochs_of_one_trainer_add_up() -> None:
    model, data = boring.Classifier(), boring.Blobs(world_size=2)
    trainer = _trainer(use_distributed_sampler=False)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule=data)
    assert (trainer.current_epoch, trainer.global_step) == (3, 18)
    straight = boring.Classifier()
    one = boring.trainer(max_epochs=1, use_distributed_sampler=False)
    one.fit(straight, datamodule=data)
    one.fit_loop.max_epochs = 3
    one.fit(straight, datamodule=data)
    boring.assert_same_weights(model, straight)


_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")


class _Facts(pl.Callback):
    """Gathers what the workers know; a plain attribute comes back from rank 0."""

    def __init__(self) -> None:
        self.facts: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        ranks = pl_module.all_gather(torch.tensor(trainer.global_rank)).tolist()
        sampler = trainer.train_dataloader.sampler
        self.facts.append(
            {
                "ranks": ranks,
                "world": (trainer.world_size, trainer.num_nodes, trainer.node_rank),
                "sampler": (sampler.num_replicas, sampler.rank, sampler.shuffle),
                "cwd": os.getcwd(),
                "variable": os.environ.get("MGPU_TEST"),
                "place": pl_module.all_gather(
                    torch.tensor([int(os.environ[name]) for name in _PLACE])
                ).tolist(),
                "threads": torch.get_num_threads(),
                "node": ray.get_runtime_context().get_assigned_resources(),
                "trainer": trainer,
                "hooked": os.environ.get("MGPU_HOOK"),
            }
        )


def test_workers_stand_where_the_driver_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = _Facts()
    with monkeypatch.context() as patched:
        patched.setenv("MGPU_TEST", "here")
        trainer = _trainer(callbacks=[facts])
        trainer.fit(boring.Classifier(), DataLoader(boring.blobs(), batch_size=4, shuffle=True))
    (seen,) = facts.facts
    assert seen["ranks"] == [0, 1]
    assert seen["world"] == (2, 1, 0)
    assert seen["sampler"] == (2, 0, True)
    assert seen["place"] == [[0, 0, 2, 2, 0], [1, 1, 2, 2, 0]], "for data sharded by variables"
    assert (seen["cwd"], seen["variable"], seen["threads"]) == (str(tmp_path), "here", 1)
    assert seen["trainer"] is trainer, "what both sides have keeps its identity"
    trainer.fit_loop.max_epochs = 2
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    assert facts.facts[-1]["variable"] is None, "left over from the call before"


def test_resources_hook_and_ddp_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _Facts()
    monkeypatch.setenv("MGPU_HOOK", "the driver's")
    strategy = RayStrategy(
        num_workers=1,
        num_cpus_per_worker=2,
        resources_per_worker={"tape": 1, "CPU": 0.5},
        init_hook=lambda: os.environ.update(MGPU_HOOK="called"),
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    model = _Unused()
    boring.trainer(strategy, "auto", callbacks=[facts]).fit(model, datamodule=boring.Blobs())
    monkeypatch.undo()
    assert strategy._ddp_kwargs["find_unused_parameters"]
    assert facts.facts[0]["node"] == {"CPU": 0.5, "tape": 1.0}
    assert facts.facts[0]["hooked"] == "called"
    close()
    assert worker_group._groups == []


class _Unused(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)


def test_logger_writes_where_the_driver_says(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    trainer = _trainer(logger=logger, log_every_n_steps=1)
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
    assert "train_loss_step" in Path(logger.log_dir, "metrics.csv").read_text()
    assert trainer.log_dir == str(tmp_path / "logs" / "version_0")


class _Unfreezing(boring.Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


def test_parameters_that_are_unfrozen_train_as_on_one_device() -> None:
    kwargs: Any = {"max_epochs": 3, "use_distributed_sampler": False}
    expected, model = _Unfreezing(), _Unfreezing()
    boring.trainer("auto", 1, **kwargs).fit(expected, datamodule=boring.Blobs(8))
    _trainer(**kwargs).fit(model, datamodule=boring.Blobs(4, world_size=2))
    assert not torch.equal(expected.net[0].weight, boring.Classifier().net[0].weight)
    boring.assert_same_weights(model, expected)


class _Tuned(boring.Classifier):
    lr = 0.5

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_learning_rate_is_found_as_on_one_device(num_workers: int) -> None:
    def tuned(trainer: pl.Trainer) -> tuple[Any, float]:
        model = _Tuned()
        data = DataLoader(boring.blobs(), batch_size=1)
        found = Tuner(trainer).lr_find(model, data, num_training=20)
        assert trainer.state.finished
        assert not trainer.callbacks or not isinstance(trainer.callbacks[0], LearningRateFinder)
        boring.assert_same_weights(model, _Tuned())
        return found, model.lr

    # Every rank sees the same samples, in their order.
    found, lr = tuned(_trainer(num_workers, use_distributed_sampler=False))
    expected, theirs = tuned(boring.trainer("auto", 1))
    assert lr == found.suggestion() == theirs != 0.5
    torch.testing.assert_close(found.results, expected.results, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="batch size is currently not supported with distributed"):
        Tuner(_trainer(num_workers)).scale_batch_size(_Tuned())
    close()


def test_dataloader_workers_and_predictions_of_several_loaders() -> None:
    class Labels(boring.Classifier):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch[1]

    loaders = [DataLoader(boring.blobs(size), batch_size=4, num_workers=1) for size in (10, 7)]
    first, second = _trainer().predict(Labels(), loaders)
    assert torch.cat(first).tolist() == [i % 3 for i in range(10)]
    assert torch.cat(second).tolist() == [i % 3 for i in range(7)]


class _Fails(boring.Classifier):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and self.global_rank == 1:
            if self.how == "raise":
                raise ZeroDivisionError("here it is")
            os.kill(os.getpid(), 9)
        return super().training_step(batch, batch_idx)


def test_original_exception_arrives_and_the_next_call_works() -> None:
    trainer = _trainer()
    with pytest.raises(ZeroDivisionError, match="here it is") as caught:
        trainer.fit(_Fails("raise"), datamodule=boring.Blobs())
    assert "training_step" in str(caught.value.__cause__)
    assert "On rank 1" in str(caught.value.__cause__)
    assert trainer.interrupted
    assert worker_group._groups == []
    _trainer().fit(boring.Classifier(), datamodule=boring.Blobs())
    assert len(worker_group._groups) == 1


def test_weights_from_before_a_failed_run_are_not_saved_as_those_of_the_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(_Fails("raise"), datamodule=boring.Blobs())
    assert "on_exception.ckpt is not written" in caplog.text
    assert "storage_path" in caplog.text
    assert not list(tmp_path.glob("*.ckpt"))
    trainer.save_checkpoint(tmp_path / "asked.ckpt")
    assert (tmp_path / "asked.ckpt").exists()


def test_killed_worker_is_named() -> None:
    with pytest.raises(WorkerDiedError, match="Rank 1 died"):
        _trainer().fit(_Fails("kill"), datamodule=boring.Blobs())
    assert worker_group._groups == []


def test_worker_killed_between_calls_is_replaced() -> None:
    facts = _Pids()
    _trainer(1, callbacks=[facts]).fit(boring.Classifier(), datamodule=boring.Blobs())
    os.kill(facts.pid, 9)
    _trainer(1).fit(boring.Classifier(), datamodule=boring.Blobs())


class _Pids(pl.Callback):
    pid = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.pid = os.getpid()


def test_unpicklable_object_is_named_before_anything_starts() -> None:
    model = boring.Classifier()
    model.net.lock = threading.Lock()
    with pytest.raises(UnpicklableError, match=r"`model\.net\.lock` cannot be pickled"):
        _trainer().fit(model, datamodule=boring.Blobs())


def test_too_few_resources_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    close()
    monkeypatch.setattr(cluster, "_WARNING_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "_RESOURCES_SECONDS", 0.1)
    words = r"ask for 64 × \(CPU: 1\), and the cluster has 1 node \(CPU: 4, tape: 2\).*free: "
    with pytest.raises(LaunchError, match=words):
        _trainer(64).fit(boring.Classifier(), datamodule=boring.Blobs())
    assert worker_group._groups == []


def test_idle_workers_end() -> None:
    close()
    keep_warm(0)
    try:
        _trainer(1).fit(boring.Classifier(), datamodule=boring.Blobs())
        for thread in threading.enumerate():
            if thread.name == "mgpu-ray-idle":
                thread.join(5)
        assert worker_group._groups == []
    finally:
        keep_warm(300)
    with pytest.raises(ValueError, match=r"keep_warm\(-1\)"):
        keep_warm(-1)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_workers=0"):
        RayStrategy(num_workers=0)
    with pytest.raises(ValueError, match=r"`RayStrategy` reserve nothing"):
        RayStrategy(num_cpus_per_worker=0)
    with pytest.raises(ValueError, match=r"trains on 1 GPU"):
        RayStrategy(resources_per_worker={"GPU": 2})
    with pytest.raises(MisconfigurationException, match=r"num_nodes=2.*num_workers=2"):
        _trainer(num_nodes=2).fit(boring.Classifier(), datamodule=boring.Blobs())
    with pytest.raises(MisconfigurationException, match=r"devices=3.*num_workers=2"):
        boring.trainer(RayStrategy(num_workers=2), 3).fit(boring.Classifier(), boring.Blobs())
