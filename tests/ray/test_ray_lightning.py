"""What users of `ray_lightning` relied on, beside what other tests of `RayStrategy` show."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import boring
import numpy as np
import pytest
import ray.train
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI

from lightning_mgpu.ray import RayStrategy
from lightning_mgpu.ray.ray_train import prepare


@pytest.mark.parametrize("name", ["RayStrategy", "lightning_mgpu.ray.RayStrategy"])
def test_lightning_cli_instantiates_the_strategy(name: str) -> None:
    given = {
        "num_workers": 4,
        "use_gpu": False,
        "bucket_cap_mb": 50,  # of torch's DistributedDataParallel
        "find_unused_parameters": True,
    }
    arguments = [f"--trainer.strategy={name}", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.strategy.{key}={value}" for key, value in given.items()]
    with patch("sys.argv", ["any.py", *arguments]):
        cli = LightningCLI(
            boring.Classifier, boring.Blobs, run=False, seed_everything_default=False
        )
    strategy = cli.trainer.strategy
    assert isinstance(strategy, RayStrategy)
    assert (strategy.num_workers, strategy.use_gpu) == (4, False)
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 50
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    written = cli.config["trainer"]["strategy"]["init_args"]
    assert {key: written[key] for key in given} == given


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("ddp_ray", "RayStrategy"),
        ("fsdp_ray", "RayShardedStrategy"),
        ("pipeline_ray", "RayPipelineStrategy"),
    ],
)
def test_name_of_a_strategy_is_no_number_of_workers(name: str, class_name: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{name}.*{class_name}\(num_workers="):
        boring.trainer(name, 2)


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_strategy_of_another_trainer_is_refused(accelerator: str) -> None:
    strategy = RayStrategy()
    trainer = boring.trainer(strategy, "auto")
    assert isinstance(trainer.accelerator, CPUAccelerator)
    with pytest.raises(MisconfigurationException, match=r"`RayStrategy` belongs to another Train"):
        boring.trainer(strategy, "auto", accelerator=accelerator)


@pytest.mark.parametrize("number", [2.0, np.int64(2), (2.0, 2)])
def test_number_of_workers_may_be_a_whole_number_of_any_type(number: Any) -> None:
    assert RayStrategy(num_workers=number).num_workers == 2


@pytest.mark.parametrize("number", [2.5, "2", True, None, float("inf"), float("nan"), {"a": 1}])
def test_number_of_workers_of_another_kind_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match=r"`num_workers=.*`: expected a number, or least and most"):
        RayStrategy(num_workers=number)


def test_trial_of_ray_tune_is_no_worker_of_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """There Ray answers by raising a deprecation warning, which ended every trial."""

    def get_context() -> None:
        raise DeprecationWarning("use the equivalent `ray.tune` API")

    monkeypatch.setattr(ray.train, "get_context", get_context)
    assert prepare.place() is None
    assert boring.trainer(RayStrategy(), "auto").strategy.launcher is not None


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_train_load_and_predict(num_workers: int, tmp_path: Path) -> None:
    model = boring.Classifier("adam")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = boring.trainer(
        RayStrategy(num_workers=num_workers),
        "auto",
        default_root_dir=tmp_path,
        enable_checkpointing=True,
        max_epochs=8,
        callbacks=[EarlyStopping("val_loss", patience=2)],
    )
    trainer.fit(model, datamodule=boring.Blobs())
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
    path = trainer.checkpoint_callback.best_model_path
    boring.assert_same_weights(boring.Classifier.load_from_checkpoint(path), model)
    predictions = torch.cat(trainer.predict(model, datamodule=boring.Blobs()))
    accuracy = (predictions.argmax(1) == boring.blobs()[:][1]).double().mean()
    assert accuracy >= 0.9
