"""`RayStrategy` on the workers that Ray Train starts."""

import json
import os
from pathlib import Path

import boring
import pytest
import ray
import ray.train
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from ray.train.torch import TorchTrainer

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.ray import RayStrategy, close, connection, fit, prepare_trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

_CPU = {"resources_per_worker": {"CPU": 0.5}}


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    close()
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


def test_config_reaches_the_weights_of_ddp(tmp_path: Path) -> None:
    """A worker is killed in the second epoch, and the group goes on from the end of the first."""
    (tmp_path / "ticket").touch()
    node = {"strategy": "auto", "enable_progress_bar": False, "enable_model_summary": False}
    cfg = OmegaConf.create(
        {
            "seed": 3,
            "output_dir": "out",
            "model": {"_target_": "ray_train_models.Dies", "ticket": "ticket", "optimizer": "adam"},
            "data": {"_target_": "boring.Blobs", "world_size": 2},
            "strategy": {
                "_target_": "lightning_mgpu.ray.RayStrategy",
                "num_workers": 2,
                "num_cpus_per_worker": 0.5,
                "find_unused_parameters": "${unused}",
            },
            "unused": True,
            "trainer": {
                "_target_": "lightning.pytorch.Trainer",
                "accelerator": "cpu",
                "max_epochs": 2,
                "logger": False,
                "use_distributed_sampler": False,
                **{name: value for name, value in node.items() if name != "strategy"},
            },
        }
    )
    before = OmegaConf.to_container(cfg)
    run = RunConfig(storage_path=str(tmp_path), failure_config=FailureConfig(max_failures=1))
    result = fit(cfg, run_config=run)
    assert OmegaConf.to_container(cfg) == before
    assert not (tmp_path / "ticket").exists(), "nobody was killed"
    expected = boring.Classifier("adam")
    stock = boring.trainer(max_epochs=2, use_distributed_sampler=False)
    stock.fit(expected, datamodule=boring.Blobs(world_size=2))
    checkpoint = torch.load(Path(result.checkpoint.path) / "checkpoint.ckpt", weights_only=True)
    ours = boring.Classifier("adam")
    ours.load_state_dict(checkpoint["state_dict"])
    boring.assert_same_weights(ours, expected)
    assert result.metrics["val_loss"] == pytest.approx(float(stock.callback_metrics["val_loss"]))
    assert (result.metrics["epoch"], checkpoint["epoch"]) == (1, 1)


def test_users_own_torch_trainer(tmp_path: Path) -> None:
    """Ours, Ray's own and a wrong one, one after another in the function of the user's."""

    def loop() -> None:
        facts = {}
        kinds = {
            "ours": (RayStrategy(), []),
            "rays": (RayDDPStrategy(), [RayLightningEnvironment()]),
        }
        for name, (strategy, plugins) in kinds.items():
            trainer = prepare_trainer(
                boring.trainer(strategy, "auto", plugins=plugins, callbacks=[])
            )
            trainer.fit(boring.Classifier(), datamodule=boring.Blobs())
            facts[f"{name}_place"] = [trainer.global_rank, trainer.world_size, trainer.local_rank]
        for strategy in ("auto", RayStrategy(num_workers=3)):
            try:
                prepare_trainer(boring.trainer(strategy, 1))
            except MisconfigurationException as error:
                facts[f"wrong_{len(facts)}"] = str(error)
        if ray.train.get_context().get_world_rank() == 0:
            (tmp_path / "facts.json").write_text(json.dumps(facts))

    trainer = TorchTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=2, **_CPU),
        run_config=RunConfig(name="mine", storage_path=str(tmp_path)),
    )
    with connection.signal_handlers_kept():
        trainer.fit()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["ours_place"] == facts["rays_place"] == [0, 2, 0]
    assert "`SingleDeviceStrategy` takes this worker for rank 0 of 1" in facts["wrong_2"]
    assert "`RayStrategy(num_workers=3)` within a worker" in facts["wrong_3"]
    checkpoints = sorted(path.name for path in (tmp_path / "mine").glob("checkpoint_*"))
    assert len(checkpoints) >= 1


def test_driver_is_no_worker() -> None:
    with pytest.raises(MisconfigurationException, match=r"use `Trainer\(strategy=RayStrategy"):
        prepare_trainer(boring.trainer(RayStrategy(), "auto"))


def test_strategy_without_workers_on_ray_is_refused() -> None:
    node = {"_target_": "lightning_mgpu.DDPStrategy"}
    with pytest.raises(ConfigError, match=r"strategy=DDPStrategy: it has no workers on Ray"):
        fit(OmegaConf.create({"strategy": node, "output_dir": "out"}))
    assert os.listdir() == []
