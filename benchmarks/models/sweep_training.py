"""The training of one trial: some epochs of digits."""

import json
import os
import time
from pathlib import Path

CLOCKS = "SWEEP_CLOCKS"  # variable with a directory: each process notes its trials' times there


def fit(lr: float, epochs: int, output: str) -> float:
    """Train, and return the validation loss."""
    started = time.time()
    import torch
    from lightning.pytorch import Trainer

    from lightning_mgpu.demo.data import Digits
    from lightning_mgpu.demo.lenet import LeNet

    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        default_root_dir=output,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(LeNet(lr=lr, l1=16, l2=16, channels=[4, 8]), datamodule=Digits())
    finally:  # it may be stopped
        with Path(os.environ[CLOCKS], str(os.getpid())).open("a") as clock:
            clock.write(json.dumps([started, time.time()]) + "\n")
    return float(trainer.callback_metrics["val_loss"])
