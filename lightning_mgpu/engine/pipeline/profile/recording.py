"""Take down when the stages work, while they do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_mgpu.engine.device import clock
from lightning_mgpu.engine.pipeline.profile.timeline import Kind, Span, Timeline


class Recording:
    """Of one step.

    Waiting for other stages and fetching what they send is not work.

    Args:
        devices: Of the stages.
        stages_per_device: How many of them lie on each device.
    """

    def __init__(self, devices: Sequence[torch.device], stages_per_device: int = 1) -> None:
        self._stages_per_device = stages_per_device
        self._clocks = [clock(device) for device in devices]
        self._chunks: list[int] = []
        # What each stage's thread takes down, with the stamps of its clock.
        self._taken: list[tuple[int, int, int, Kind, Any, Any]] = []

    @property
    def calls(self) -> int:
        """How often the module has been called."""
        return len(self._chunks)

    def begin_call(self, chunks: int) -> int:
        """The number of a call that is about to begin."""
        self._chunks.append(chunks)
        return self.calls - 1

    @contextmanager
    def taken_down(self, stage: int, chunk: int, call: int, kind: Kind) -> Iterator[None]:
        """Within, the stage is at work."""
        start = self.now(stage)
        yield
        self.add(stage, chunk, call, kind, start)

    def now(self, stage: int) -> Any:
        """A stamp of the stage's clock."""
        return self._clocks[stage].now()

    def add(self, stage: int, chunk: int, call: int, kind: Kind, start: Any) -> None:
        """Take down that a stage has been at work since a stamp."""
        self._taken.append((stage, chunk, call, kind, start, self.now(stage)))

    def timeline(self) -> Timeline:
        """What has been taken down so far; waits for devices that are still at it."""
        spans = [
            Span(stage, chunk, call, kind, own.seconds(start), own.seconds(end))
            for stage, chunk, call, kind, start, end in list(self._taken)
            for own in [self._clocks[stage]]
        ]
        return Timeline.of(len(self._clocks), self._chunks, spans, self._stages_per_device)
