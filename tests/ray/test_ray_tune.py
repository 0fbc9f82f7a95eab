"""Trials of Ray Tune that train on several workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boring
import pytest
import torch
from ray import tune

from lightning_mgpu.ray import RayStrategy
from lightning_mgpu.ray.tune import (
    TuneReportCallback,
    TuneReportCheckpointCallback,
    get_tune_resources,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


_TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _tune_cleaned_up() -> Iterator[None]:
    """Tune leaves handlers of signals and variables of its own behind."""
    environment = dict(os.environ)
    handlers = {signum: signal.getsignal(signum) for signum in _TAKEN}
    yield
    os.environ.clear()
    os.environ.update(environment)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _train(config: dict[str, Any]) -> None:
    model = boring.Classifier()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=config["lr"])
    callback = TuneReportCheckpointCallback({"loss": "val_loss", "acc": "val_acc"}, "model.ckpt")
    boring.trainer(
        RayStrategy(config["workers"], num_cpus_per_worker=2),
        "auto",
        callbacks=[callback],
        max_epochs=2,
    ).fit(model, datamodule=boring.Blobs())


def test_trials_with_workers_of_their_own(tmp_path: Path) -> None:
    """All four CPUs are the workers': nothing is reserved twice, or it would never start."""
    tuner = tune.Tuner(
        tune.with_resources(_train, get_tune_resources(2, num_cpus_per_worker=2)),
        param_space={"lr": tune.grid_search([0.001, 0.5]), "workers": 2},
        tune_config=tune.TuneConfig(metric="loss", mode="min", reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    best = results.get_best_result()
    assert best.config["lr"] == 0.5
    assert [result.metrics["training_iteration"] for result in results] == [2, 2]
    path = Path(best.checkpoint.to_directory(tmp_path / "best")) / "model.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] == 1
    model = boring.Classifier()
    model.load_state_dict(checkpoint["state_dict"])
    (measured,) = boring.trainer("auto", 1).validate(model, datamodule=boring.Blobs())
    assert measured["val_loss"] == pytest.approx(best.metrics["loss"], abs=1e-9)


def _stopped_early(config: dict[str, Any]) -> None:
    boring.trainer(
        RayStrategy(num_workers=1),
        "auto",
        callbacks=[TuneReportCallback("val_loss")],
        max_epochs=50,
    ).fit(boring.Classifier(), datamodule=boring.Blobs())


def test_tune_run_stops_a_trial(tmp_path: Path) -> None:
    analysis = tune.run(
        _stopped_early,
        metric="val_loss",
        mode="min",
        num_samples=1,
        stop={"training_iteration": 2},
        resources_per_trial=get_tune_resources(num_workers=1),
        storage_path=str(tmp_path),
        verbose=0,
    )
    assert analysis.trials[0].status == "TERMINATED"
    assert analysis.best_result["training_iteration"] == 2


def test_example_of_ray_lightning(tmp_path: Path) -> None:
    import ray_lightning_example as example

    values = {"layer_1": 32, "layer_2": 32, "lr": 0.01, "batch_size": 32}
    trainer = example.train(values)
    assert float(trainer.callback_metrics["ptl/val_accuracy"]) > 0.8
    assert trainer.lightning_module.accuracy.num_classes == 10
    assert Path(trainer.checkpoint_callback.best_model_path).exists()
    analysis = example.tune_mnist(num_samples=1, storage_path=str(tmp_path))
    assert analysis.best_config.keys() == example.SPACE.keys()
    assert analysis.best_result["training_iteration"] == 4
    assert analysis.best_result["acc"] > 0.3


def test_resources_of_a_trial() -> None:
    factory = get_tune_resources(2, num_cpus_per_worker=3, use_gpu=True)
    assert factory.required_resources == {"CPU": 6.0, "GPU": 2.0}
    assert factory.bundles[-1] == {"CPU": 3.0, "GPU": 1.0}


def test_unknown_moment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on='validation'.*'validation' is not one of.*train_end"):
        TuneReportCallback("val_loss", on="validation")


def test_metric_that_is_not_logged_is_named() -> None:
    trainer = boring.trainer("auto", 1, callbacks=[TuneReportCallback("loss")])
    with pytest.raises(ValueError, match=r"'loss' has not been logged; there is .*val_loss"):
        trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
