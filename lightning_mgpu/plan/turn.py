"""Measure a few steps with a module cut in one way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from typing_extensions import override

from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.profile.recording import Recording
from lightning_mgpu.engine.pipeline.profile.timeline import Kind, PipelineTimeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.plan.ledger import Ledger, Watched
from lightning_mgpu.plan.profile import Sample

# Steps that are measured, after one to warm up; before that one, one in which bytes are counted.
_STEPS = 3


class _Counted(Chunks):
    """Fixed number of micro-batches that records the time taken."""

    done: tuple[int, int] | None = None

    @override
    def took(self, count: int, seconds: float, samples: int) -> None:
        self.done = count, samples


@dataclass
class Turn:
    """Steps with the module cut in one way, into one number of micro-batches.

    Attributes:
        pipeline: The module.
        chunks: The number.
        watched: The pipeline's `forward`, if bytes are to be counted.
        seconds: Of each step that counts, from its begin to that of the next.
        forward: Of each step, what each stage has taken.
        backward: The same of backward.
        weights: Of backward, what is for gradients of weights that come later.
        ledger: The bytes.
    """

    pipeline: Pipeline
    chunks: int
    watched: Watched | None = None
    seconds: list[float] = field(default_factory=list)
    forward: list[list[float]] = field(default_factory=list)
    backward: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    ledger: Ledger | None = None
    _is_warm: bool = False
    _counted: _Counted | None = None
    _recording: Recording | None = None

    @property
    def is_over(self) -> bool:
        return len(self.seconds) == _STEPS

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._counted is None:  # the step's first call
            self._begin()
        return self.pipeline(*args, **kwargs)

    def take(self, seconds: float, batch: int) -> bool:
        """Record the time of a step; return whether it counts."""
        counted, self._counted = self._counted, None
        recording, self._recording = self._recording, None
        ledger = None
        if self.watched is not None:
            ledger, self.watched.ledger = self.watched.ledger, None
        if counted is None or recording is None or counted.done != (self.chunks, batch):
            return False
        if ledger is not None:
            self.ledger = ledger
        elif not self._is_warm:
            self._is_warm = True
        else:
            timeline = recording.timeline()
            self.seconds.append(seconds)
            self.forward.append(_seconds(timeline, "forward"))
            self.weights.append(_seconds(timeline, "weights"))
            inputs = _seconds(timeline, "backward")
            self.backward.append([sum(pair) for pair in zip(inputs, self.weights[-1], strict=True)])
        return True

    def _begin(self) -> None:
        stages = self.pipeline.cutter.stages
        self.pipeline.chunks = self._counted = _Counted(stages, self.chunks)
        self.pipeline.recording = self._recording = Recording(self.pipeline.devices)
        if self.watched is not None and self.ledger is None:
            roots = self.pipeline.cutter.roots
            own = (t for root in roots for t in (*root.parameters(), *root.buffers()))
            self.watched.ledger = Ledger(own)


def sample_of(apart: Turn, whole: Turn, batch: int) -> Sample:
    """Combine the measurements of both turns.

    Args:
        apart: Each layer in a stage of its own.
        whole: All in one stage.
        batch: Samples in a batch.
    """
    costs, overheads = [], []
    for of_layers, of_whole in (
        (apart.forward, whole.forward),
        (apart.backward, whole.backward),
    ):
        (together,) = _medians(of_whole, whole.chunks)
        layer_seconds, overhead = _shared_out(_medians(of_layers, apart.chunks), together)
        costs.append(layer_seconds)
        overheads.append(overhead)
    shares = [
        of_weights / seconds if seconds else 0.0
        for of_weights, seconds in zip(
            _medians(apart.weights, 1), _medians(apart.backward, 1), strict=True
        )
    ]
    steps = zip(whole.seconds, whole.forward, whole.backward, strict=True)
    assert apart.ledger is not None
    return Sample(
        chunks=whole.chunks,
        size=batch / whole.chunks,
        forward=costs[0],
        backward=costs[1],
        weights=[share * seconds for share, seconds in zip(shares, costs[1], strict=True)],
        overhead=(overheads[0], overheads[1]),
        own=median(seconds - sum(f) - sum(b) for seconds, f, b in steps),
        values={who: size / apart.chunks for who, size in apart.ledger.total().items()},
    )


def _seconds(timeline: PipelineTimeline, kind: Kind) -> list[float]:
    """Seconds of each stage for all micro-batches."""
    taken = [0.0] * timeline.stages
    for span in timeline.spans:
        if span.kind == kind:
            taken[span.stage] += span.end - span.start
    return taken


def _medians(steps: Sequence[Sequence[float]], chunks: int) -> list[float]:
    """Median seconds of each stage for one micro-batch."""
    return [median(of_stage) / chunks for of_stage in zip(*steps, strict=True)]


def _shared_out(apart: Sequence[float], whole: float) -> tuple[list[float], float]:
    """Split measured time into that of layers and the overhead per stage.

    Args:
        apart: What each layer takes as a stage of its own.
        whole: What all take as one stage.
    """
    others = len(apart) - 1
    overhead = min(max(0.0, sum(apart) - whole) / others, whole) if others else 0.0
    layer_seconds = [max(0.0, seconds - overhead) for seconds in apart]
    total = sum(layer_seconds)
    factor = (whole - overhead) / total if total else 0.0
    return [seconds * factor for seconds in layer_seconds], overhead
