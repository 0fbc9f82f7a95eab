"""Options of `mode=plan`."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint


@dataclass(kw_only=True)
class Options:
    """Pipelines to compare: every combination of these options.

    Raises:
        ValueError: A number makes no sense, or a list is empty.
    """

    stages: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Stages per pipeline."""
    stages_per_device: Sequence[int] = (1,)
    """Stages per device."""
    defer_weight_gradients: Sequence[bool] = (True,)
    """Whether gradients of weights come later than those of inputs."""
    chunks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    """Micro-batches per batch."""
    replicas: Sequence[int] = (1, 2, 4, 8)
    """Copies of the whole pipeline, each with its own batch."""
    checkpoint: Sequence[Checkpoint] = ("never", "always")
    """Activation checkpointing."""
    bandwidth: float = 1e10
    """Bandwidth between two devices in bytes per second."""
    latency: float = 1e-5
    """Latency of a message in seconds."""
    memory: float | None = None
    """Memory per device in bytes; rows that need more get `fits=False`."""
    threads: int = 1
    """Intra-op threads per device, for CPUs."""

    def __post_init__(self) -> None:
        for name in ("stages", "stages_per_device", "chunks", "replicas"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: give numbers of at least 1.")
        for name in ("checkpoint", "defer_weight_gradients"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: give at least one.")
        for name in ("bandwidth", "memory", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: give more than 0.")
        if self.latency < 0:
            raise ValueError(f"latency={self.latency}: give 0 or more.")
