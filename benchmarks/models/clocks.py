"""Callbacks of `ray_steady.py`, in a module that workers can import."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Timer(pl.Callback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


class Ended(pl.Callback):
    """Writes down when rank 0 has ended.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(time.time()))
