"""Record when the stages work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lightning_mgpu.engine.device import clock
from lightning_mgpu.engine.pipeline.profile.timeline import Kind, PipelineTimeline, StageSpan


class Recording:
    """Recorded work of the stages in one step.

    Waiting for other stages and fetching what they send is not work.

    Args:
        devices: Of the stages.
        stages_per_device: How many of them lie on each device.
    """

    def __init__(self, devices: Sequence[torch.device], stages_per_device: int = 1) -> None:
        self._clocks = [clock(device) for device in devices[: len(devices) // stages_per_device]]
        self._stages = len(devices)
        self._chunks: list[int] = []
        # What each stage's thread records, with the stamps of its clock.
        self._taken: list[tuple[int, int, int, Kind, Any, Any]] = []

    @property
    def calls(self) -> int:
        """Number of calls of the module."""
        return len(self._chunks)

    def begin_call(self, chunks: int, stages: int) -> int:
        """The number of a call that is about to begin, with that many stages."""
        self._stages = stages
        self._chunks.append(chunks)
        return self.calls - 1

    @contextmanager
    def recorded(self, stage: int, chunk: int, call: int, kind: Kind) -> Iterator[None]:
        """Context in which a stage's work is recorded."""
        start = self.now(stage)
        yield
        self.add(stage, chunk, call, kind, start)

    def now(self, stage: int) -> Any:
        """A stamp of the stage's clock."""
        return self._clocks[stage % len(self._clocks)].now()

    def add(self, stage: int, chunk: int, call: int, kind: Kind, start: Any) -> None:
        """Record a stage's work since a stamp."""
        self._taken.append((stage, chunk, call, kind, start, self.now(stage)))

    def timeline(self) -> PipelineTimeline:
        """Timeline of the recorded work; waits for devices to finish."""
        spans: list[StageSpan] = []
        latest: dict[int, int] = {}
        for stage, chunk, call, kind, start, end in list(self._taken):
            device = stage % len(self._clocks)
            own = self._clocks[device]
            span = StageSpan(stage, chunk, call, kind, own.seconds(start), own.seconds(end))
            before = spans[latest[device]] if device in latest else None
            # Gradients of a stage's weights come one by one.
            if (
                before
                and kind == "weights"
                and replace(span, start=0, end=0) == replace(before, start=0, end=0)
            ):
                spans[latest[device]] = replace(before, end=span.end)
                continue
            latest[device] = len(spans)
            spans.append(span)
        around = self._stages // len(self._clocks)
        return PipelineTimeline.of(self._stages, self._chunks, spans, around)
