"""Trials whose Trainer has several devices by a strategy of Lightning's; no Ray needed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boring
import lightning.fabric.strategies.launchers as fabric_launchers
import pytest
import torch
from boring import Blobs, Classifier
from lightning.fabric import Fabric
from lightning.pytorch import Trainer, strategies
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

import lightning_mgpu
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.sweep.trial import reporter, reporting
from lightning_mgpu.sweep.trial.actor_reset import adopt
from lightning_mgpu.sweep.trial.launchers import take_over_launches
from lightning_mgpu.sweep.trial.reporting import Reporting

METRICS: list[dict[str, Any]] = []


def send(metrics: dict[str, Any], directory: Path | None) -> None:
    """Stands for Ray, which stops the trial after two reports."""
    METRICS.append(metrics)
    if len(METRICS) == 2:
        raise SystemExit(0)


@pytest.fixture(autouse=True)
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a trial's."""
    for owner, name in (
        (DDPStrategy, "_configure_launcher"),
        (_SubprocessScriptLauncher, "launch"),
        (fabric_launchers._SubprocessScriptLauncher, "launch"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    take_over_launches()
    METRICS.clear()
    reporting.begin(Reporting(send, ("val_loss",)), lambda _: [*reporter.callbacks()])
    yield
    reporting.end()


class Ranked(Classifier):
    """Logs how many ranks there are."""

    def on_validation_epoch_end(self) -> None:
        self.log("ranks", float(len(self.all_gather(torch.tensor(1.0)).reshape(-1))))


class Own(DDPStrategy):
    """A strategy of the user's."""

    given = "by the user"


def trainer(strategy: Any) -> Trainer:
    """A Trainer of two devices, which ends only when it is stopped."""
    return boring.trainer(strategy, 2, max_epochs=9)


@pytest.mark.parametrize(
    "strategy",
    [
        *("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn", "ddp_notebook"),
        *(Own(start_method="fork"), lightning_mgpu.DDPStrategy()),
    ],
    ids=lambda strategy: strategy if isinstance(strategy, str) else type(strategy).__name__,
)
def test_two_devices_train_one_trial_that_reports_and_stops(strategy: Any) -> None:
    before = dict(os.environ)
    one = trainer(strategy=strategy)
    one.fit(Ranked(), datamodule=Blobs())
    assert [metrics["ranks"] for metrics in METRICS] == [2, 2]
    assert one.current_epoch == 2
    assert isinstance(one.strategy, DDPStrategy)
    if isinstance(strategy, Own):
        assert isinstance(one.strategy, Own)
        assert one.strategy.given == "by the user"
    assert dict(os.environ) == before


def test_one_trainer_fits_tests_and_predicts() -> None:
    one = trainer(strategy="ddp")
    model = Ranked()
    one.fit(model, datamodule=Blobs())
    assert one.test(model, datamodule=Blobs(), verbose=False)[0]["test_loss"] > 0
    predicted = one.predict(model, datamodule=Blobs())
    assert predicted is not None
    assert sum(len(batch) for batch in predicted) == 48  # of both ranks


def test_trial_within_a_job_of_slurm_starts_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NTASKS", "PROCID", "LOCALID", "NODEID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    state = adopt(ProcessState.capture(1), 1)  # as the driver's state comes to a trial
    with patch.dict(os.environ, state.environment, clear=True):
        trainer(strategy="ddp").fit(Ranked(), datamodule=Blobs())
    assert [metrics["ranks"] for metrics in METRICS] == [2, 2]


def test_strategy_that_would_run_the_sweep_again_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    one = trainer(strategy=strategies.ModelParallelStrategy())
    with pytest.raises(RuntimeError, match=r"ModelParallelStrategy on several .*strategy=mgpu_ddp"):
        one.fit(Ranked(), datamodule=Blobs())
    with pytest.raises(RuntimeError, match="Fabric on several devices: it runs the command"):
        Fabric(accelerator="cpu", devices=2, strategy="ddp").launch()


def test_trainer_with_one_device_is_as_ever() -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    one = Trainer(accelerator="cpu", devices=1, max_epochs=9, enable_checkpointing=False, **quiet)
    with pytest.raises(SystemExit):
        one.fit(Ranked(), datamodule=Blobs())
    assert one.strategy.launcher is None
