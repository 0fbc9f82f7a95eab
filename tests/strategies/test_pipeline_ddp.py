"""Processes with a pipeline each. (`test_parity` compares them with one device.)"""

import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import boring
import parity_models
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mgpu import PipelineDDPStrategy
from lightning_mgpu.engine.pipeline.partition import cutter
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, Measured
from lightning_mgpu.engine.pipeline.partition.observation import registered
from lightning_mgpu.engine.workers import available_cores
from lightning_mgpu.strategies.stages import planning

FAR = 60.0  # seconds; a hang would last half an hour


class Deep(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )


def test_processes_share_the_devices_and_the_data() -> None:
    class Counts(Deep):
        def on_train_start(self) -> None:
            strategy, loader = self.trainer.strategy, self.trainer.train_dataloader
            assert loader is not None
            mine = (self.global_rank, len(strategy.stage_devices), len(loader.sampler))
            found = self.all_gather(torch.tensor(mine))
            self.found = [tuple(row) for row in found.tolist()]

    model = Counts()
    trainer = boring.trainer(PipelineDDPStrategy(stages=3), devices=6)
    assert (trainer.num_devices, trainer.world_size) == (6, 2)
    trainer.fit(model, datamodule=boring.Blobs(4, size=48))
    assert model.found == [(0, 3, 24), (1, 3, 24)]
    assert trainer.global_step == 6


def test_each_process_has_devices_of_its_own() -> None:
    strategy = PipelineDDPStrategy(
        parallel_devices=[torch.device("meta", i) for i in range(6)], stages=2
    )
    assert strategy.num_processes == 3
    assert strategy.stage_devices == [torch.device("meta", 0), torch.device("meta", 1)]
    assert strategy.root_device == torch.device("meta", 0)


def test_threads_are_shared_among_all_stages_of_a_machine() -> None:
    devices = [torch.device("cpu")] * 4
    threads = PipelineDDPStrategy(parallel_devices=devices).threads_per_device
    assert threads == max(1, available_cores() // 4)


def test_entry_points_one_after_another() -> None:
    model, data = Deep(), boring.Blobs(5, size=23)
    trainer = boring.trainer("pipeline_ddp", devices=4)
    forward = type(model.net).forward
    for _ in range(2):
        trainer.fit(model, datamodule=data)
        assert set(trainer.validate(model, datamodule=data, verbose=False)[0]) >= {"val_loss"}
        batches = trainer.predict(model, datamodule=data)
        torch.testing.assert_close(torch.cat(batches), model(boring.blobs(23)[:][0]))
        assert model.net.forward.__func__ is forward, "the module has its own forward again"


def test_checkpoint_continues_on_one_device(tmp_path: Path) -> None:
    expected, model = Deep("adam"), Deep("adam")
    boring.trainer("auto", 1, max_epochs=4).fit(expected, datamodule=boring.Blobs(12))
    half = boring.trainer("pipeline_ddp", 4, max_epochs=2, use_distributed_sampler=False)
    half.fit(Deep("adam"), datamodule=boring.Blobs(6, world_size=2))
    half.save_checkpoint(tmp_path / "half.ckpt")
    whole = boring.trainer("auto", 1, max_epochs=4)
    whole.fit(model, datamodule=boring.Blobs(12), ckpt_path=tmp_path / "half.ckpt")
    boring.assert_same_weights(model, expected)


def test_several_stages_on_a_device_give_the_same() -> None:
    alone, split = Deep(), Deep()
    boring.trainer("auto", 1, max_epochs=2).fit(alone, datamodule=boring.Blobs(12))
    boring.trainer(
        PipelineDDPStrategy(stages=1, stages_per_device=3),
        2,
        max_epochs=2,
        use_distributed_sampler=False,
    ).fit(split, datamodule=boring.Blobs(6, world_size=2))
    boring.assert_same_weights(split, alone)


def test_processes_take_the_same_choice_of_stages() -> None:
    class ToldApart(Deep):
        """Handing over takes no time on the first process, and very long on the other."""

        def setup(self, stage: str) -> None:
            called = registered(self.net)
            costs = {call.name: Cost(1.0, 1, 2, 0.5) for call in called.walk()}
            hand_over = float(self.global_rank)
            self.patches = ExitStack()
            for module, name, value in (
                (cutter, "measured", Measured(called, costs)),
                (planning, "hand_over_seconds", hand_over),
            ):
                self.patches.enter_context(patch.object(module, name, lambda *_, v=value: v))

        def on_train_end(self) -> None:
            stages = torch.tensor(len(self.trainer.strategy.stage_devices))
            self.found = self.all_gather(stages).tolist()

        def teardown(self, stage: str) -> None:
            self.patches.close()
            del self.patches

    alone, split = Deep(), ToldApart()
    boring.trainer("auto", 1).fit(alone, datamodule=boring.Blobs(12))
    boring.trainer(
        PipelineDDPStrategy(stages=2, stages_per_device="auto", chunks=4),
        devices=4,
        use_distributed_sampler=False,
    ).fit(split, datamodule=boring.Blobs(6, world_size=2))
    boring.assert_same_weights(split, alone)
    assert split.found == [4, 4]


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_parameters_of_a_stage_that_are_not_used(find_unused_parameters: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sometimes(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).tanh()

    class Model(parity_models.Model):
        build = Net

    alone, split = Model(), Model()
    boring.trainer("auto", 1, max_epochs=2).fit(alone, datamodule=boring.Blobs(12))
    strategy = PipelineDDPStrategy(stages=2, find_unused_parameters=find_unused_parameters)
    boring.trainer(strategy, 4, max_epochs=2, use_distributed_sampler=False).fit(
        split, datamodule=boring.Blobs(6, world_size=2)
    )
    boring.assert_same_weights(split, alone)


class Fault(Deep):
    """Breaks in the second stage of the second process."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), Fault.Breaking()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    class Breaking(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.distributed.get_rank() == 1:
                raise ArithmeticError("cannot count")
            return super().forward(x)

    build = Net


def test_error_of_a_stage_names_process_stage_and_micro_batch() -> None:
    started = time.monotonic()
    with pytest.raises(ArithmeticError, match="cannot count") as raised:
        boring.trainer("pipeline_ddp", 4).fit(Fault(), datamodule=boring.Blobs())
    assert time.monotonic() - started < FAR
    assert "On rank 1" in str(raised.value.__cause__)
    assert "stage 1 of 2 on cpu, micro-batch 0 of" in str(raised.value.__cause__)
    boring.trainer("pipeline_ddp", 4, fast_dev_run=True).fit(Deep(), datamodule=boring.Blobs())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PipelineDDPStrategy\(stages=0\)`: .* at least 1"):
        PipelineDDPStrategy(stages=0)
    with pytest.raises(ValueError, match=r"PipelineDDPStrategy\(chunks=0\)`: give a number"):
        PipelineDDPStrategy(chunks=0)
    with pytest.raises(
        MisconfigurationException, match="3 devices cannot be divided into processes"
    ):
        boring.trainer(PipelineDDPStrategy(stages=2), devices=3)
    with pytest.raises(MisconfigurationException, match="synchronised batch"):
        boring.trainer("pipeline_ddp", 4, sync_batchnorm=True).fit(Deep(), boring.Blobs())
