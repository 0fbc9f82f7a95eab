"""A model shared out among Ray's workers. FSDP wants GPUs; what is ours is tried without them."""

from functools import partial
from pathlib import Path
from typing import Any

import boring
import pytest
import torch
from configs import config
from hydra.utils import instantiate

from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray import RayShardedStrategy, close, connection

# Lightning's FSDP computes in float32, whatever the model's type.
SINGLE = 1e-5


def _fsdp_on_the_cpu() -> None:
    """Torch can shard over CPUs if told so, and if nothing is to be moved there."""
    from torch.distributed import fsdp

    class OnCPU(fsdp.FullyShardedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "device_id": torch.device("cpu")})

    for name in ("FullStateDictConfig", "FullOptimStateDictConfig"):
        stays = partial(getattr(fsdp.api, name), rank0_only=False, offload_to_cpu=False)
        for module in (fsdp, fsdp.api):
            setattr(module, name, lambda *_, stays=stays, **__: stays())
    fsdp.FullyShardedDataParallel = OnCPU


def _sharded(**kwargs: Any) -> RayShardedStrategy:
    strategy = RayShardedStrategy(num_workers=2, init_hook=_fsdp_on_the_cpu, **kwargs)
    strategy.use_gpu, strategy._resources = False, {"CPU": 1.0}
    return strategy


class Buffered(boring.Classifier):
    def __init__(self) -> None:
        super().__init__("adam", scheduler=True)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_whole_model_returns_and_training_goes_on(tmp_path: Path) -> None:
    expected, sharded, data = Buffered(), Buffered(), boring.Blobs(4, world_size=2)
    kwargs: Any = {"use_distributed_sampler": False}
    alone = boring.trainer("auto", 1, max_epochs=2, **kwargs)
    alone.fit(expected, datamodule=boring.Blobs(8))
    arguments: Any = {"auto_wrap_policy": {torch.nn.Linear}, "state_dict_type": "sharded"}
    trainer = boring.trainer(_sharded(**arguments), "auto", max_epochs=1, **kwargs)
    trainer.fit(sharded, datamodule=data)
    trainer.save_checkpoint("half.ckpt")
    half = torch.load("half.ckpt", weights_only=True)
    assert half["state_dict"]["net.0.weight"].shape == (8, 6)
    assert half["optimizer_states"][0]["state"][0]["exp_avg"].shape == (8, 6)

    whole = boring.trainer(_sharded(**arguments), "auto", max_epochs=2, **kwargs)
    # What is each rank's own is not looked for where rank 0 has it.
    whole.fit(sharded, datamodule=data, ckpt_path=f"/proc/self/root/{tmp_path}/half.ckpt")
    boring.assert_same_weights(sharded, expected, SINGLE)
    assert sharded.seen == 12  # no checkpoint has it, but the model that is sent
    ours, theirs = (t.optimizers[0].state_dict()["state"] for t in (whole, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=SINGLE, check_dtype=False)
    assert whole.optimizers[0].param_groups[0]["params"][0] is sharded.net[0].weight
    assert whole.global_step == 12
    batches = whole.predict(sharded, datamodule=boring.Blobs(5, size=23))
    torch.testing.assert_close(
        torch.cat(batches).double(), expected(boring.blobs(23)[:][0]), rtol=0, atol=SINGLE
    )
    close()


def test_workers_without_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"use_gpu={}\)`: FSDP .*GPUs, and these workers have none.*`RayStrategy`"
    with pytest.raises(ValueError, match=words.format(False)):
        RayShardedStrategy(num_workers=2, use_gpu=False)
    with pytest.raises(ValueError, match=words.format(True)):
        RayShardedStrategy(num_workers=2, resources_per_worker={"GPU": 0})
    monkeypatch.setattr(connection, "is_ours", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        LaunchError, match=r"trains on GPUs only, and this machine has none.*ray://"
    ):
        RayShardedStrategy(num_workers=2).group()


def test_optimizers_have_to_know_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"use_orig_params=False.*Leave it out"):
        RayShardedStrategy(use_orig_params=False)


def test_config_asks_for_gpus() -> None:
    strategy = instantiate(config("+strategy=ray_sharded").strategy)
    assert isinstance(strategy, RayShardedStrategy)
    assert strategy._resources == {"CPU": 1, "GPU": 1}
