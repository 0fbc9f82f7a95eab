"""Optimizer state lies with its parameter, also after a run has been taken up again."""

from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from gpu_runs import BATCH, CPU, GPU, SIZE, dp, pipeline, trainer


@pytest.mark.parametrize("devices", [(GPU, GPU), (CPU, GPU), (GPU, CPU)], ids=["gpus", "cg", "gc"])
@pytest.mark.parametrize("make", [dp, pipeline])
def test_resumed_run_is_the_run_without_a_break(make: Any, devices: Any) -> None:
    whole, first, second = (boring.Classifier("adam") for _ in range(3))
    data = boring.Blobs(BATCH, SIZE)
    trainer(make(*devices), max_steps=8).fit(whole, data)
    half = trainer(make(*devices), max_steps=4)
    half.fit(first, data)
    half.save_checkpoint("half.ckpt")
    found = torch.load("half.ckpt", weights_only=True)  # a plain checkpoint
    assert found["global_step"] == 4
    rest = trainer(make(*devices), max_steps=8, callbacks=[States()])
    rest.fit(second, data, ckpt_path="half.ckpt")
    boring.assert_same_weights(whole, second, 1e-12)
    alone = boring.Classifier("adam")
    trainer("auto", max_steps=8).fit(alone, data, ckpt_path="half.ckpt")
    boring.assert_same_weights(alone, second, 1e-9)


class States(pl.Callback):
    """Looks at the optimizer's state after each step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                assert state["exp_avg"].device == parameter.device
