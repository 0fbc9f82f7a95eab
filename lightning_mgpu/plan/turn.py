"""A few steps with a module cut in one way, and what they have taken."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from typing_extensions import override

from lightning_mgpu.engine.pipelining.ledger import Ledger, ObservedCutter
from lightning_mgpu.engine.pipelining.pipeline import Pipeline
from lightning_mgpu.engine.pipelining.timer import Timer
from lightning_mgpu.engine.pipelining.tuning import Chunks
from lightning_mgpu.plan.profile import Sample

__all__: list[str] = []

# Steps that are measured, after one to warm up.
_STEPS = 3


class _Counted(Chunks):
    """A fixed number of micro-batches; tells what came of it."""

    done: tuple[int, int] | None = None

    @override
    def took(self, count: int, seconds: float, samples: int) -> None:
        self.done = count, samples


@dataclass
class Turn:
    """Steps with the module cut in one way, into one number of micro-batches."""

    pipeline: Pipeline
    chunks: int
    ledger: Ledger | None = None
    seconds: list[float] = field(default_factory=list)
    """Of each step that counts, from its begin to that of the next."""
    forward: list[list[float]] = field(default_factory=list)
    """Of each step, what each stage has taken."""
    backward: list[list[float]] = field(default_factory=list)
    _is_warm: bool = False
    _counted: _Counted | None = None

    @property
    def is_over(self) -> bool:
        return len(self.seconds) == _STEPS

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._counted is None:  # the step's first call
            self._begin()
        return self.pipeline(*args, **kwargs)

    def _begin(self) -> None:
        cutter = self.pipeline.cutter
        self.pipeline.chunks = self._counted = _Counted(cutter.stages, self.chunks)
        if isinstance(cutter, ObservedCutter):
            cutter.ledger = None
            if not self._is_warm:
                self.ledger = cutter.observe()

    def take(self, seconds: float, timer: Timer, batch: int) -> bool:
        """Take down what a step has taken; whether it counts."""
        counted, self._counted = self._counted, None
        if counted is None or counted.done != (self.chunks, batch):
            return False
        if self._is_warm:
            self.seconds.append(seconds)
            self.forward.append(timer.forward)
            self.backward.append(timer.backward)
        self._is_warm = True
        return True


def sample_of(apart: Turn, whole: Turn, batch: int) -> Sample:
    """What both turns together tell.

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
    steps = zip(whole.seconds, whole.forward, whole.backward, strict=True)
    assert apart.ledger is not None
    return Sample(
        chunks=whole.chunks,
        size=batch / whole.chunks,
        forward=costs[0],
        backward=costs[1],
        overhead=(overheads[0], overheads[1]),
        own=median(seconds - sum(f) - sum(b) for seconds, f, b in steps),
        values={who: size / apart.chunks for who, size in apart.ledger.total().items()},
    )


def _medians(steps: Sequence[Sequence[float]], chunks: int) -> list[float]:
    """Of each stage, for one micro-batch."""
    return [median(of_stage) / chunks for of_stage in zip(*steps, strict=True)]


def _shared_out(apart: Sequence[float], whole: float) -> tuple[list[float], float]:
    """What layers take in one stage, and what each stage takes beside.

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
