"""Workers on Ray with a pipeline each."""

import os
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import ray
import torch
from configs import config
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mgpu.ray import RayPipelineStrategy
from lightning_mgpu.ray.ranks import RankAssignment


class Last(nn.Linear):
    """Breaks on rank 1 when there is a file ``broken``."""

    def forward(self, x: Tensor) -> Tensor:
        if Path("broken").exists() and torch.distributed.get_rank() == 1:
            raise ArithmeticError("cannot count")
        return super().forward(x)


class Deep(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), Last(8, 3))


class _Facts(pl.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        self.facts = {
            "asked": ray.get_runtime_context().get_assigned_resources(),
            "devices": [device.type for device in strategy.stage_devices],
            "world": (trainer.world_size, trainer.train_dataloader.sampler.num_replicas),
        }
        self.pid = os.getpid()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_with_stages_equal_one_device_and_name_the_stage_that_fails() -> None:
    alone, split, facts = Deep("adam"), Deep("adam"), _Facts()
    expected = boring.trainer("auto", 1, max_epochs=2)
    expected.fit(alone, datamodule=boring.Blobs(12))
    kwargs: Any = {"max_epochs": 2, "use_distributed_sampler": False, "callbacks": [facts]}
    trainer = boring.trainer(RayPipelineStrategy(num_workers=2, chunks=3), "auto", **kwargs)
    trainer.fit(split, datamodule=boring.Blobs(6, world_size=2))
    assert facts.pid != os.getpid()
    assert facts.facts == {"asked": {"CPU": 2.0}, "devices": ["cpu", "cpu"], "world": (2, 2)}
    boring.assert_same_weights(split, alone)
    theirs = dict(expected.callback_metrics)
    torch.testing.assert_close(dict(trainer.callback_metrics), theirs, rtol=0, atol=1e-9)
    state, other = (t.optimizers[0].state_dict()["state"] for t in (trainer, expected))
    torch.testing.assert_close(state, other, rtol=0, atol=1e-9)
    assert split.net.forward.__func__ is nn.Sequential.forward
    batches = trainer.predict(split, datamodule=boring.Blobs(5, size=23))
    torch.testing.assert_close(torch.cat(batches), split(boring.blobs(23)[:][0]))

    Path("broken").touch()
    with pytest.raises(ArithmeticError, match="cannot count") as caught:
        trainer.fit(split, datamodule=boring.Blobs(6))
    assert "On rank 1" in str(caught.value.__cause__)
    assert "stage 1 of 2 on cpu, micro-batch 0 of" in str(caught.value.__cause__)


def _resources(**kwargs: Any) -> dict[str, float]:
    return RayPipelineStrategy(**kwargs)._resources


def test_each_worker_asks_for_its_stages() -> None:
    assert _resources() == {"CPU": 2}
    assert _resources(stages=3) == {"CPU": 3}
    assert _resources(stages=3, num_cpus_per_worker=1, use_gpu=True) == {"CPU": 1, "GPU": 3}
    assert _resources(resources_per_worker={"GPU": 2, "CPU": 0}) == {"GPU": 2}


def test_config_takes_the_arguments_of_both() -> None:
    strategy = instantiate(config("+strategy=ray_pipeline", "strategy.chunks=2").strategy)
    assert isinstance(strategy, RayPipelineStrategy)
    assert (strategy.num_workers, strategy.stages, strategy._planning.chunks) == (2, 2, 2)
    assert strategy._resources == {"CPU": 2}


def test_each_worker_has_devices_of_its_own() -> None:
    strategy = RayPipelineStrategy(num_workers=2, num_cpus_per_worker=6, use_gpu=True, stages=3)
    place = RankAssignment(1, 2, local_rank=1, local_world_size=2, node_rank=0, num_nodes=1)
    strategy.take_place(place)
    try:
        assert strategy.stage_devices == [torch.device("cuda", i) for i in range(3)]
        assert strategy.root_device == torch.device("cuda", 0)
        assert (strategy.num_processes, strategy.world_size, strategy.global_rank) == (2, 2, 1)
        assert strategy.threads_per_device == 2
        assert strategy.bound_device is None
    finally:
        pl.utilities.rank_zero_only.rank = 0


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RayPipelineStrategy\(stages=0\)`: .* at least 1"):
        RayPipelineStrategy(stages=0)
    with pytest.raises(ValueError, match=r"'GPU': 1}.*RayPipelineStrategy.* trains on 2 GPUs"):
        RayPipelineStrategy(resources_per_worker={"GPU": 1})
    with pytest.raises(ValueError, match=r"RayPipelineStrategy\(chunks=0\)`: give a number"):
        RayPipelineStrategy(chunks=0)
    trainer = boring.trainer(RayPipelineStrategy(num_workers=2), 3)
    with pytest.raises(MisconfigurationException, match=r"devices=3.*each worker has 2 devices"):
        trainer.fit(Deep(), datamodule=boring.Blobs())
