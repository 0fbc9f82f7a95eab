"""What a trial reports from within Lightning's Trainer; no Ray needed."""

import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boring import Blobs, Classifier
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_mgpu.sweep.trial import pbt, reporter, reporting
from lightning_mgpu.sweep.trial.reporting import NotFiniteError, Reporting


class Sent:
    """Stands for Ray: keeps what is reported, and stops the trial after `stop_after` reports."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.directories: list[Path | None] = []
        self.stop_after = stop_after

    def __call__(self, metrics: dict[str, Any], directory: Path | None) -> None:
        self.metrics.append(metrics)
        self.directories.append(directory)
        if directory is not None:
            assert (directory / reporter.CHECKPOINT).exists()
        if len(self.metrics) == self.stop_after:
            raise SystemExit(0)

    @property
    def epochs(self) -> list[int]:
        return [metrics["epoch"] for metrics in self.metrics]


@pytest.fixture
def sent() -> Iterator[Sent]:
    yield Sent()
    reporting.end()


def begin(trial: Reporting) -> None:
    reporting.begin(trial, lambda _: [*reporter.callbacks()])


_REPORTING = ("every_n_epochs", "saves", "restore_from", "notify", "wanted", "directory")


def make_trainer(sent: Sent, *, metrics: str = "val_loss", **options: Any) -> Trainer:
    """A Trainer as made within a trial; options of `Reporting` and of the Trainer."""
    given = {name: options.pop(name) for name in _REPORTING if name in options}
    given = {"strategy" if name == "wanted" else name: value for name, value in given.items()}
    begin(Reporting(send=sent, metrics=tuple(metrics.split()), **given))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {**quiet, "max_epochs": 2, "accelerator": "cpu", **options}
    callbacks = [*given.pop("callbacks", []), *reporter.callbacks()]
    return Trainer(callbacks=callbacks, **given)


def fit(sent: Sent, model: Any = None, **options: Any) -> Trainer:
    """Fit as a trial does."""
    trainer = make_trainer(sent, **options)
    trainer.fit(model or Classifier(), datamodule=Blobs())
    return trainer


def test_outside_a_trial_there_is_no_callback() -> None:
    assert reporter.callbacks() == []


def test_lightning_finds_the_callback_by_itself(sent: Sent) -> None:
    names = [entry.value for entry in entry_points(group="lightning.pytorch.callbacks_factory")]
    assert "hydra_plugins.ray_tune_sweeper._lightning:callbacks" in names
    begin(Reporting(send=sent, metrics=("val_loss",)))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    assert sent.epochs == [0]


def test_each_epoch_is_reported_once_with_all_metrics(sent: Sent) -> None:
    trainer = fit(sent)
    assert sent.epochs == [0, 1]
    assert sent.metrics[-1]["val_loss"] == float(trainer.callback_metrics["val_loss"])
    assert {"train_loss_epoch", "val_acc"} <= set(sent.metrics[0])
    assert all(type(value) in (int, float, str) for value in sent.metrics[0].values())


def test_validation_within_an_epoch_is_reported(sent: Sent) -> None:
    fit(sent, val_check_interval=0.5, limit_train_batches=4)
    assert [(m["epoch"], m["step"]) for m in sent.metrics] == [(0, 2), (0, 4), (1, 6), (1, 8)]


def test_only_epochs_with_a_validation_are_reported(sent: Sent) -> None:
    fit(sent, check_val_every_n_epoch=2, max_epochs=4)
    assert sent.epochs == [1, 3]


def test_metric_of_training_is_reported_in_every_epoch(sent: Sent) -> None:
    fit(sent, metrics="train_loss_epoch", check_val_every_n_epoch=2, max_epochs=4)
    assert sent.epochs == [0, 1, 2, 3]


def test_several_metrics_are_reported_where_all_of_them_are(sent: Sent) -> None:
    fit(sent, metrics="val_loss val_acc", max_epochs=1)
    assert sent.epochs == [0]
    assert {"val_loss", "val_acc"} <= set(sent.metrics[0])
    fit(sent, metrics="val_loss val_los")
    assert sent.epochs == [0]


def test_training_without_validation_is_reported(sent: Sent) -> None:
    fit(sent, metrics="train_loss_epoch", limit_val_batches=0)
    assert sent.epochs == [0, 1]


def test_every_second_epoch_is_reported_if_asked(sent: Sent) -> None:
    fit(sent, every_n_epochs=2, max_epochs=5)
    assert sent.epochs == [1, 3]


def test_sanity_check_validate_and_test_report_nothing(sent: Sent) -> None:
    trainer = fit(sent, max_epochs=1, num_sanity_val_steps=2)
    trainer.validate(Classifier(), datamodule=Blobs(), verbose=False)
    trainer.test(Classifier(), datamodule=Blobs(), verbose=False)
    assert sent.epochs == [0]


def test_trainer_without_checkpoints_says_so_as_ever(sent: Sent) -> None:
    trainer = make_trainer(sent, enable_checkpointing=None, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Blobs())
    with pytest.raises(ValueError, match="`ModelCheckpoint` is not configured"):
        trainer.test(ckpt_path="best", datamodule=Blobs())


def test_second_fit_goes_on_reporting(sent: Sent) -> None:
    trainer = make_trainer(sent, max_epochs=1)
    model = Classifier()
    trainer.fit(model, datamodule=Blobs())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=Blobs())
    assert sent.epochs == [0, 1]


def fold(sent: Sent, trial: Reporting, epochs: int = 2) -> None:
    begin(trial)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        max_epochs=epochs,
        callbacks=[*reporter.callbacks()],
    )
    trainer.fit(Classifier(), datamodule=Blobs())


def test_job_with_several_fits_reports_its_end_alone(sent: Sent) -> None:
    told: list[str] = []
    trial = Reporting(send=sent, metrics=("val_loss",), notify=lambda kind, _: told.append(kind))
    for epochs in (2, 3, 1):
        fold(sent, trial, epochs)
    assert sent.epochs == [0, 1]  # of the first one, when nobody could know
    assert told == ["folds"]
    assert [metrics["epoch"] for metrics in trial.held] == [0]  # of the last one

    later = Reporting(send=sent, metrics=("val_loss",), has_folds=True)  # the next trial
    for _ in range(2):
        fold(sent, later)
    assert sent.epochs == [0, 1]
    assert len(later.held) == 2


def test_list_of_callbacks_that_two_trainers_share_reports_once(sent: Sent) -> None:
    callbacks: list[Any] = []
    for _ in range(2):
        begin(Reporting(send=sent, metrics=("val_loss",)))
        callbacks += reporter.callbacks()
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, callbacks=callbacks)
    trainer.fit(Classifier(), datamodule=Blobs())
    assert sent.epochs == [0]


def test_metric_that_is_not_logged_is_not_reported(sent: Sent) -> None:
    fit(sent, metrics="val_los")
    assert sent.metrics == []
    current = reporting.current()
    assert current is not None
    assert {"val_loss", "train_loss"} <= current.logged.keys()


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({"num_sanity_val_steps": 2}, "train_loss, train_loss_epoch, train_loss_step, val_acc"),
        ({"limit_val_batches": 0}, "train_loss, train_loss_epoch, train_loss_step."),
        ({"check_val_every_n_epoch": 3}, None),
    ],
)
def test_metric_that_the_first_validation_did_not_log_is_told_of_once(
    sent: Sent, options: dict[str, Any], logged: str | None
) -> None:
    told: list[tuple[str, str]] = []
    fit(sent, metrics="val_los", notify=lambda *words: told.append(words), **options)
    if logged is None:
        assert told == []
        return
    ((kind, text),) = told
    assert kind == "metric"
    assert text.startswith("hydra.sweeper.metric=val_los has not been logged by the first")
    assert f"logged were: {logged}" in text
    assert ("Did you mean val_loss?" in text) == ("val_acc" in logged)


@pytest.mark.parametrize("strategy", ["auto", "dp"])
def test_trainer_without_the_strategy_of_the_config_is_told_of(sent: Sent, strategy: str) -> None:
    told: list[tuple[str, str]] = []
    fit(
        sent,
        wanted="lightning_mgpu.strategies.DDPStrategy",
        notify=lambda *words: told.append(words),
        strategy=strategy,
        max_epochs=1,
    )
    if strategy == "dp":
        assert told == []
        return
    ((kind, text),) = told
    assert kind == "strategy"
    assert "strategies.single_device.SingleDeviceStrategy: it does not read" in text
    assert "+strategy@trainer.strategy=" in text


def test_files_outside_of_the_directory_of_the_trial_are_told_of(
    sent: Sent, tmp_path: Path
) -> None:
    """Two trials at once may choose the same `version_1`."""
    told: list[str] = []
    own = tmp_path / "3"

    def notify(kind: str, text: str) -> None:
        told.append(f"{kind}: {text}")

    given = {"directory": own, "notify": notify, "max_epochs": 1}
    fit(sent, **given, callbacks=[ModelCheckpoint(own / "checkpoints")], logger=CSVLogger(own))
    assert told == []
    fit(sent, **given, callbacks=[ModelCheckpoint()], logger=True)
    (text,) = told
    assert text.startswith(f"places: A trial writes outside of its directory {own.resolve()}: logs")
    assert f"logs in {tmp_path}/lightning_logs/version_0" in text
    assert f"checkpoints in {tmp_path}/lightning_logs/version_0/checkpoints" in text
    assert "default_root_dir=${hydra:runtime.output_dir}" in text


def test_nothing_is_said_of_a_metric_that_is_logged(sent: Sent) -> None:
    told: list[tuple[str, str]] = []
    fit(sent, metrics="train_loss_epoch", notify=lambda *words: told.append(words))
    assert told == []


class Late(Classifier):
    """Logs its metric from the third epoch on, and in its test."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch >= 2:
            self.log("late", float(self.current_epoch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/acc", 0.75)


def test_metric_that_comes_late_is_reported_from_there(sent: Sent) -> None:
    fit(sent, Late(), metrics="late", max_epochs=4)
    assert [metrics["late"] for metrics in sent.metrics] == [2, 3]


def test_what_test_logs_is_known_to_the_trial(sent: Sent) -> None:
    model = Late()
    trainer = fit(sent, model, metrics="test/acc", max_epochs=1)
    trainer.test(model, datamodule=Blobs(), verbose=False)
    current = reporting.current()
    assert current is not None
    assert current.logged["test/acc"] == 0.75
    assert sent.metrics == []


_KINDS = {
    "whole": 3,
    "yes": True,
    "single": np.float32(0.25),
    "count": np.int64(4),
    "tensor": torch.tensor(2),
    "truth": torch.tensor(True),
    "one": torch.tensor([1.5]),
    "unlimited": float("-inf"),
}


class Kinds(Classifier):
    """Logs numbers of every kind, and of several loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for name, value in _KINDS.items():
            self.log(name, value)
        self.log("of_steps", float(batch_idx), on_step=True, on_epoch=True)


def test_numbers_of_every_kind_are_reported_as_such(sent: Sent) -> None:
    fit(sent, Kinds(), metrics=" ".join(name for name in _KINDS if name != "unlimited"))
    for name, value in _KINDS.items():
        assert sent.metrics[-1][name] == float(value)
        assert type(sent.metrics[-1][name]) is float
    sent.metrics.clear()
    fit(sent, Kinds(), metrics="train_loss_step of_steps of_steps_epoch")
    # of steps the latest one, and of an epoch the mean, which has the plain name as well
    last = sent.metrics[-1]
    assert last["of_steps"] == last["of_steps_epoch"]
    assert last["train_loss_step"] != last["train_loss_epoch"] == last["train_loss"]


def test_metric_of_several_loaders_has_a_name_for_each(sent: Sent) -> None:
    class Two(Blobs):
        def val_dataloader(self) -> Any:
            return [super().val_dataloader()] * 2

    told: list[str] = []
    trainer = make_trainer(sent, metrics="whole", notify=lambda _, text: told.append(text))
    trainer.fit(Kinds(), datamodule=Two())
    assert sent.metrics == []
    assert told[0].endswith("ends without it ends the sweep.")
    assert "Did you mean whole/dataloader_idx_0?" in told[0]
    trainer = make_trainer(sent, metrics="whole/dataloader_idx_1")
    trainer.fit(Kinds(), datamodule=Two())
    assert [metrics["whole/dataloader_idx_1"] for metrics in sent.metrics] == [3, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_first_report_that_is_no_number_ends_the_trial(sent: Sent, value: float) -> None:
    class Wild(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", value)

    with pytest.raises(NotFiniteError, match=f"val_loss is {value} in epoch 0"):
        fit(sent, Wild())
    assert sent.metrics == []


def test_nan_ends_the_trial(sent: Sent) -> None:
    class Diverging(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(float("nan") if self.current_epoch else 1.0))

    with pytest.raises(NotFiniteError, match="val_loss is nan in epoch 1"):
        fit(sent, Diverging())
    assert sent.epochs == [0]


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_trial_that_is_stopped_has_saved_its_checkpoint_and_log(
    sent: Sent, tmp_path: Path, on_train_epoch_end: bool
) -> None:
    sent.stop_after = 2
    checkpoint = ModelCheckpoint(
        tmp_path,
        monitor="val_loss",
        save_top_k=-1,
        filename="{epoch}",
        save_on_train_epoch_end=on_train_epoch_end,
    )
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(SystemExit):
        fit(sent, callbacks=[checkpoint], logger=logger, max_epochs=9)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=0.ckpt", "epoch=1.ckpt"}
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    epochs = [line.split(",")[lines[0].split(",").index("epoch")] for line in lines[1:]]
    assert epochs[-1] == "1"
    assert sent.metrics[-1][reporter.BEST_CHECKPOINT].endswith(".ckpt")


def test_checkpoints_are_reported_with_the_epoch_they_are_of(sent: Sent, tmp_path: Path) -> None:
    callbacks = [
        ModelCheckpoint(tmp_path, filename="only", monitor="epoch", mode="min"),
        ModelCheckpoint(tmp_path, filename="latest", enable_version_counter=False),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=2),
    ]

    class Numbered(Classifier):
        def on_validation_epoch_end(self) -> None:
            self.log("epoch", float(self.current_epoch))

    fit(sent, Numbered(), callbacks=callbacks, max_epochs=3)
    saved = [
        {Path(path).name: epoch for path, epoch in metrics.get(reporter.SAVED, ())}
        for metrics in sent.metrics
    ]
    assert saved == [
        {"only.ckpt": 0, "latest.ckpt": 0},
        {"latest.ckpt": 1, "epoch=1.ckpt": 1},
        {"latest.ckpt": 2},
    ]


def test_checkpoint_is_named_only_where_one_was_saved(sent: Sent, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_epochs=9)
    fit(sent, callbacks=[callback], max_epochs=1)
    assert reporter.BEST_CHECKPOINT not in sent.metrics[-1]
    latest = ModelCheckpoint(tmp_path, filename="latest")
    fit(sent, callbacks=[callback, latest], max_epochs=1)
    assert sent.metrics[-1][reporter.BEST_CHECKPOINT] == str(tmp_path / "latest.ckpt")


def test_ranks_stop_together(sent: Sent) -> None:
    sent.stop_after = 1
    trainer = fit(sent, strategy="mgpu_ddp", devices=2, max_epochs=9)
    assert sent.epochs == [0]
    assert trainer.current_epoch == 1


class Tuned(Classifier):
    """Its optimizer has the hyperparameters that it is made with."""

    def __init__(self, kind: str, schedule: str | None = None, **hyperparameters: Any) -> None:
        super().__init__()
        self.kind, self.schedule, self.hyperparameters = kind, schedule, hyperparameters
        self.at_start: list[dict[str, Any]] = []

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), **self.hyperparameters)
        if self.schedule is None:
            return optimizer
        step = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        if self.schedule == "step":
            return [optimizer], [step]
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1)
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, step], milestones=[1])
        return [optimizer], [both]

    def on_train_epoch_start(self) -> None:
        group = self.optimizers().param_groups[0]
        self.at_start.append({k: v for k, v in group.items() if k != "params"})


class Keeping(Sent):
    """Keeps the directories, as Ray's storage does."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def __call__(self, metrics: dict[str, Any], directory: Path | None) -> None:
        assert directory is not None
        kept = self.directory / str(len(self.metrics))
        kept.mkdir()
        for file in directory.iterdir():
            (kept / file.name).write_bytes(file.read_bytes())
        super().__call__(metrics, directory)


def exploit(tmp_path: Path, old: Tuned, new: Tuned, epochs: int = 3) -> Sent:
    """Train `old` for two epochs, and go on with `new` from there, as population-based training."""
    fit(Keeping(tmp_path), old, saves=True)
    sent = Sent()
    fit(sent, new, restore_from=tmp_path / "1", max_epochs=epochs)
    reporting.end()
    return sent


def test_restored_trial_goes_on_with_weights_and_optimizer(tmp_path: Path) -> None:
    same = {"lr": 0.02, "weight_decay": 0.01}
    old, new, whole = (Tuned("Adam", **same) for _ in range(3))
    sent = exploit(tmp_path, old, new)
    fit(Sent(), whole, max_epochs=3)
    reporting.end()
    assert sent.epochs == [2]
    for a, b in zip(new.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_last_checkpoint_of_a_restored_trial_is_its_own(tmp_path: Path) -> None:
    files, states = tmp_path / "files", tmp_path / "states"
    states.mkdir()
    fit(Keeping(states), Classifier(), saves=True)
    for epochs, options in ((2, {}), (3, {"restore_from": states / "1"})):
        last = ModelCheckpoint(files, save_last=True, filename="{epoch}-{step}")
        fit(Sent(), max_epochs=epochs, callbacks=[last], **options)
    reporting.end()
    assert last.last_model_path == str(files / "last.ckpt")
    assert [path.name for path in files.glob("last*")] == ["last.ckpt"]
    assert torch.load(files / "last.ckpt", weights_only=False)["epoch"] == 2


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}, {"lr": 0.03, "momentum": 0.5}),
        ("AdamW", {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.02}),
        ("Adam", {"lr": 0.01, "betas": (0.9, 0.99)}, {"lr": 0.01, "betas": (0.8, 0.9)}),
        ("SGD", {"lr": 0.0}, {"lr": 0.03}),
    ],
)
def test_mutated_hyperparameters_apply_after_restoring(
    tmp_path: Path, kind: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    model = Tuned(kind, **new)
    exploit(tmp_path, Tuned(kind, **old), model)
    seen = {
        name: list(value) if isinstance(value, (tuple, list)) else value
        for name, value in model.at_start[0].items()
    }
    for name, value in new.items():
        assert seen[name] == (list(value) if isinstance(value, tuple) else value)


def test_mutated_learning_rate_keeps_its_schedule(tmp_path: Path) -> None:
    old, new = Tuned("SGD", "step", lr=0.8), Tuned("SGD", "step", lr=0.08)
    exploit(tmp_path, old, new, epochs=4)
    assert [group["lr"] for group in old.at_start] == pytest.approx([0.8, 0.4])
    assert [group["lr"] for group in new.at_start] == pytest.approx([0.02, 0.01])


def test_mutated_learning_rate_reaches_schedules_within_schedules(tmp_path: Path) -> None:
    old, new = Tuned("SGD", "sequential", lr=0.8), Tuned("SGD", "sequential", lr=0.08)
    whole = Tuned("SGD", "sequential", lr=0.08)
    exploit(tmp_path, old, new, epochs=5)
    fit(Sent(), whole, max_epochs=5)
    expected = [group["lr"] for group in whole.at_start][2:]
    assert [group["lr"] for group in new.at_start] == pytest.approx(expected)


def test_unchanged_hyperparameters_are_left_as_restored() -> None:
    groups: pbt.Groups = [[{"lr": 0.1, "momentum": 0.9}]]
    assert pbt.compare(groups, groups) == []


def test_second_fit_of_a_restored_trial_starts_as_the_user_says(tmp_path: Path) -> None:
    fit(Keeping(tmp_path), Classifier(), saves=True)
    sent = Sent()
    fit(sent, restore_from=tmp_path / "1", max_epochs=3)
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, callbacks=[*reporter.callbacks()]
    )
    model = Classifier()
    trainer.fit(model, datamodule=Blobs())
    assert sent.epochs == [2]
    current = reporting.current()
    assert current is not None
    assert [metrics["epoch"] for metrics in current.held] == [0]  # of a run of its own


def test_restored_at_the_last_epoch_ends_without_a_report(tmp_path: Path) -> None:
    fit(Keeping(tmp_path), Classifier(), saves=True)
    sent = Sent()
    trainer = fit(sent, restore_from=tmp_path / "1", max_epochs=2)
    assert sent.epochs == []
    # which a job may ask for at its end
    expected = json.loads((tmp_path / "1" / "metrics.json").read_text())
    assert "val_loss" in expected
    assert {n: float(v) for n, v in trainer.callback_metrics.items()} == pytest.approx(expected)
