"""What to plan for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Checkpoint = Literal["never", "except_last", "always"]


@dataclass(kw_only=True)
class Options:
    """The pipelines to be compared: each combination of these.

    Raises:
        ValueError: A number makes no sense, or a list is empty.
    """

    stages: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Stages of each pipeline."""
    stages_per_device: Sequence[int] = (1,)
    """How many of the stages lie on each device."""
    chunks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    """Micro-batches."""
    replicas: Sequence[int] = (1, 2, 4, 8)
    """Copies of the whole pipeline, each with a batch of its own."""
    checkpoint: Sequence[Checkpoint] = ("never", "always")
    """What is computed again in backward, to save memory."""
    bandwidth: float = 1e10
    """Bytes a second, of each link between two devices."""
    latency: float = 1e-5
    """Seconds until the first byte of a message arrives."""
    memory: float | None = None
    """Bytes of each device, for what does not fit to be told apart."""
    threads: int = 1
    """Intra-op threads of each device, where that is a CPU."""

    def __post_init__(self) -> None:
        for name in ("stages", "stages_per_device", "chunks", "replicas"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: give numbers of at least 1.")
        if not self.checkpoint:
            raise ValueError("checkpoint=[]: give at least one.")
        for name in ("bandwidth", "memory", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: give more than 0.")
        if self.latency < 0:
            raise ValueError(f"latency={self.latency}: give 0 or more.")
