"""Queues between the stages of a pipeline."""

import queue
from typing import Generic, TypeVar

__all__: list[str] = []

T = TypeVar("T")

# How often a stage that waits looks whether it has been cancelled.
_POLL_SECONDS = 0.05


class Links(Generic[T]):
    """Queues between stages: micro-batches follow each other in the same order everywhere."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], queue.SimpleQueue[T]] = {}

    def put(self, sender: int, receiver: int, message: T) -> None:
        self._queue(sender, receiver).put(message)

    def get(self, sender: int, receiver: int) -> T:
        waiting = self._queue(sender, receiver)
        while True:
            try:
                # A thread can only be told to stop between two steps in Python.
                return waiting.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def _queue(self, sender: int, receiver: int) -> "queue.SimpleQueue[T]":
        # One of two that come at once wins, and both get the same.
        return self._queues.setdefault((sender, receiver), queue.SimpleQueue())
