"""Stages one after another in a single thread, and what each takes."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from typing_extensions import override

from lightning_mgpu.engine.workers import Workers

__all__: list[str] = []

T = TypeVar("T")


class Timer(Workers):
    """Runs the tasks of all stages in one thread.

    Args:
        device: Of all stages.
        threads: Intra-op threads.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        super().__init__([device], threads)
        self.forward: list[float] = []
        """What each stage has taken since `restart`, in seconds."""
        self.backward: list[float] = []
        """The same of backward."""
        self._is_forward = False

    def restart(self) -> None:
        """Forget what has been measured."""
        self.forward, self.backward = [], []

    def expect_forward(self) -> None:
        """The next tasks are those of a forward pass; all that follow are not."""
        self._is_forward = True

    @override
    def run(
        self,
        tasks: Sequence[Callable[[], T]],
        around_calls: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[T]:
        is_forward, self._is_forward = self._is_forward, False
        seconds = self.forward if is_forward else self.backward
        seconds += [0.0] * (len(tasks) - len(seconds))
        # Each stage finds what the one before it has sent; in backward, the one after it.
        order = range(len(tasks)) if is_forward else reversed(range(len(tasks)))
        results: dict[int, T] = {}
        for stage in order:
            timed = partial(self._timed, seconds, stage, tasks[stage])
            (results[stage],) = super().run([timed], around_calls)
        return [results[stage] for stage in range(len(tasks))]

    def _timed(self, seconds: list[float], stage: int, task: Callable[[], T]) -> T:
        self._wait()
        started = time.perf_counter()
        result = task()
        self._wait()
        seconds[stage] += time.perf_counter() - started
        return result

    def _wait(self) -> None:
        if self.devices[0].type == "cuda":
            torch.cuda.synchronize(self.devices[0])
