"""When training batches end."""

import itertools
import time
from statistics import median
from typing import Any

from lightning.pytorch import Callback

# Steps until caches and allocators are warm.
_WARM_UP = 20


class Stamps(Callback):
    """Notes when each training batch has ended."""

    def __init__(self) -> None:
        self._stamps: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self._stamps.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Milliseconds of a step: the median, without the first ones."""
        steps = [after - before for before, after in itertools.pairwise(self._stamps)]
        return 1e3 * median(steps[_WARM_UP:])
