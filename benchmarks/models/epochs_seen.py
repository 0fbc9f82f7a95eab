"""A callback of benchmarks/search_quality.py."""

import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class EpochsSeen(Callback):
    """Appends the validation accuracy of each trained epoch to a file that all trials share."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        line = f"{float(trainer.callback_metrics['val_acc']):.6f}\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())  # whole, whoever else writes
        os.close(handle)
