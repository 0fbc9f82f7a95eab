"""Timeline of a pipeline: the stages' work on micro-batches, with times."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "recompute", "backward", "weights"]


@dataclass(frozen=True)
class StageSpan:
    """A stage's work on one micro-batch.

    Attributes:
        stage: The stage.
        chunk: The micro-batch.
        call: Which of the step's calls of the module this belongs to, from 0.
        kind: What was computed: outputs, outputs once more (`checkpoint`), gradients, or gradients
            of weights that backward has left for later.
        start: In seconds.
        end: In seconds, on the same clock.
    """

    stage: int
    chunk: int
    call: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class PipelineTimeline:
    """Work of all stages in one step.

    Attributes:
        stages: How many there are.
        chunks: Micro-batches of each call of the module.
        spans: By their start, the first of which is at 0.
        stages_per_device: How many of the stages lie on each device.
    """

    stages: int
    chunks: tuple[int, ...]
    spans: tuple[StageSpan, ...]
    stages_per_device: int = 1

    @classmethod
    def of(
        cls,
        stages: int,
        chunks: Iterable[int],
        spans: Iterable[StageSpan],
        stages_per_device: int = 1,
    ) -> "PipelineTimeline":
        """Timeline from spans in any order and on any clock."""
        ordered = sorted(spans, key=lambda span: (span.start, span.stage))
        zero = ordered[0].start if ordered else 0.0
        return cls(
            stages,
            tuple(chunks),
            tuple(
                StageSpan(s.stage, s.chunk, s.call, s.kind, s.start - zero, s.end - zero)
                for s in ordered
            ),
            stages_per_device,
        )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.stages // self.stages_per_device

    @property
    def seconds(self) -> float:
        """Seconds from the start of the first span to the end of the last."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def busy(self) -> float:
        """Seconds of work, of all stages together."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def efficiency(self) -> float:
        """The share of the devices' time in which they worked; the rest is the bubble."""
        return self.busy / (self.devices * self.seconds) if self.seconds else 0.0

    @property
    def ideal(self) -> float:
        """The efficiency if all tasks took equally long and nothing else took time.

        Where gradients of weights come later, nobody waits for them: a third of the work.
        """
        bubble = (self.devices - 1) / self.stages_per_device
        if any(span.kind == "weights" for span in self.spans):
            bubble *= 2 / 3
        takes = sum(chunks + bubble for chunks in self.chunks)
        return sum(self.chunks) / takes if takes else 0.0
