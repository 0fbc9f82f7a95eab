"""Take down when the stages work, while they do."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lightning_mgpu.engine.pipelining.partition import Name
from lightning_mgpu.engine.pipelining.stage_work import Gradients, StageWork
from lightning_mgpu.engine.pipelining.timeline import Kind, Span, Timeline

__all__: list[str] = []


class Recording:
    """Of one step.

    Waiting for other stages and fetching what they send is not work.

    Args:
        devices: Of the stages.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._clocks = [_clock(device) for device in devices]
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
        clock = self._clocks[stage]
        start = clock.now()
        yield
        self._taken.append((stage, chunk, call, kind, start, clock.now()))

    def timeline(self) -> Timeline:
        """What has been taken down so far; waits for devices that are still at it."""
        spans = [
            Span(stage, chunk, call, kind, clock.seconds(start), clock.seconds(end))
            for stage, chunk, call, kind, start, end in list(self._taken)
            for clock in [self._clocks[stage]]
        ]
        return Timeline.of(len(self._clocks), self._chunks, spans)


class RecordedWork(StageWork):
    """A stage's work, taken down.

    Args:
        recording: Where.
        call: The number of the call.
        *args: Those of `StageWork`.
    """

    def __init__(self, recording: Recording, call: int, *args: Any) -> None:
        super().__init__(*args)
        self._recording, self._call = recording, call

    def forward(self, chunk: int, inputs: list[Any]) -> Sequence[Any]:
        with self._recording.taken_down(self.stage.index, chunk, self._call, "forward"):
            return super().forward(chunk, inputs)

    def backward(
        self,
        chunk: int,
        outputs: Sequence[Any],
        arrived: Mapping[Name, list[Gradients]],
        keep: bool,
    ) -> None:
        with self._recording.taken_down(self.stage.index, chunk, self._call, "backward"):
            super().backward(chunk, outputs, arrived, keep)

    def _again(self, chunk: int, inputs: list[Any]) -> tuple[list[Any], Sequence[Any]]:
        with self._recording.taken_down(self.stage.index, chunk, self._call, "recompute"):
            return super()._again(chunk, inputs)


class _Clock(Protocol):
    """Tells a device's time."""

    def now(self) -> Any:
        """A stamp of what the calling thread's device has reached."""

    def seconds(self, stamp: Any) -> float:
        """A stamp as a time of `time.perf_counter`."""


class _HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, stamp: float) -> float:
        return stamp


class _CudaClock:
    """Stamps are events, which the device comes to in its turn: nothing waits for it meanwhile."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            self._zero = self.now()
            self._zero.synchronize()
            self._zero_seconds = time.perf_counter()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, stamp: torch.cuda.Event) -> float:
        stamp.synchronize()
        milliseconds: float = self._zero.elapsed_time(stamp)
        return self._zero_seconds + milliseconds / 1e3


def _clock(device: torch.device) -> _Clock:
    return _CudaClock(device) if device.type == "cuda" else _HostClock()
