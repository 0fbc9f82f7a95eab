"""What a model's layers have been measured to take, and what a stage made of them would."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_mgpu.engine.pipelining import microbatch
from lightning_mgpu.engine.pipelining.ledger import CALLER, Holders
from lightning_mgpu.engine.pipelining.simulate import Link

__all__: list[str] = []


@dataclass(frozen=True)
class Weights:
    """The bytes that do not depend on the batch.

    Attributes:
        parameters: Of parameters and buffers.
        gradients: Of gradients.
        state: Of what the optimizer keeps.
    """

    parameters: int = 0
    gradients: int = 0
    state: int = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.state + other.state,
        )

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.state


class Span(NamedTuple):
    """The layers of a stage, from the first to before the end."""

    first: int
    end: int


@dataclass(frozen=True)
class Sample:
    """What was measured with one number of micro-batches.

    Attributes:
        chunks: The number.
        size: Samples in a micro-batch.
        forward: Seconds of each layer for one micro-batch.
        backward: The same of backward.
        overhead: What a stage takes for a micro-batch beside its layers, forward and backward.
        own: Seconds that the step takes beside the module: loss, optimizer, data, hooks.
        values: Bytes of what layers make from a micro-batch, by who holds them.
    """

    chunks: int
    size: float
    forward: Sequence[float]
    backward: Sequence[float]
    overhead: tuple[float, float]
    own: float
    values: Mapping[Holders, float]


@dataclass(frozen=True)
class Profile:
    """A model, measured.

    What lies between two measured sizes of micro-batches is taken to lie on a line between them:
    small operations are less efficient, so that nothing is just proportional.

    Attributes:
        names: Of the layers, in order; stages can begin at each.
        weights: Of each layer.
        rest: Of what is not in any layer, and lies with the first.
        batch: Samples in a batch.
        least: The fewest samples that a micro-batch may have.
        samples: By the number of micro-batches.
        split_at: The layers that the user wants stages to begin at.
    """

    names: Sequence[str]
    weights: Sequence[Weights]
    rest: Weights
    batch: int
    least: int
    samples: Sequence[Sample]
    split_at: Sequence[str] = ()

    def sizes(self, chunks: int) -> list[int]:
        """Samples in each micro-batch; fewer of them if there are too few samples."""
        return microbatch.sizes(self.batch, chunks, self.least)

    def forward(self, span: Span, size: float) -> float:
        """Seconds of a stage for a micro-batch."""
        return self._at(size, lambda s: s.overhead[0] + sum(s.forward[slice(*span)]))

    def backward(self, span: Span, size: float) -> float:
        """The same for backward, without computing anything again."""
        return self._at(size, lambda s: s.overhead[1] + sum(s.backward[slice(*span)]))

    def own(self, chunks: int) -> float:
        """Seconds of a step beside the module."""
        return _on_line([(s.chunks, s.own) for s in self.samples], chunks)

    def links(self, spans: Sequence[Span], size: float) -> dict[Link, float]:
        """Bytes that stages hand to each other with each micro-batch."""
        stage_of = [stage for stage, span in enumerate(spans) for _ in range(*span)]
        points: dict[Link, list[tuple[float, float]]] = {}
        for sample in self.samples:
            for link, sent in _links(sample.values, stage_of).items():
                points.setdefault(link, []).append((sample.size, sent))
        return {link: _on_line(of_link, size) for link, of_link in points.items()}

    def held(self, span: Span, size: float) -> float:
        """Bytes that a stage keeps of a micro-batch until its backward."""
        return self._bytes(size, lambda who: who.held(*span))

    def received(self, span: Span, size: float) -> float:
        """Bytes that come to a stage with a micro-batch."""
        return self._bytes(size, lambda who: who.received(*span))

    def weights_of(self, span: Span) -> Weights:
        """The bytes of a stage that do not depend on the batch."""
        return sum(self.weights[slice(*span)], self.rest if span.first == 0 else Weights())

    def _bytes(self, size: float, counts: Callable[[Holders], bool]) -> float:
        return self._at(size, lambda s: sum(b for who, b in s.values.items() if counts(who)))

    def _at(self, size: float, of: Callable[[Sample], float]) -> float:
        return _on_line([(sample.size, of(sample)) for sample in self.samples], size)


def _links(values: Mapping[Holders, float], stage_of: Sequence[int]) -> dict[Link, float]:
    sent: dict[Link, float] = {}
    for who, size in values.items():
        if who.producer is None:
            continue
        sender = 0 if who.producer == CALLER else stage_of[who.producer]  # the batch lies there
        for receiver in {stage_of[layer] for layer in who.consumers if layer != CALLER}:
            if receiver != sender:
                link = Link(sender, receiver)
                sent[link] = sent.get(link, 0.0) + size
    return sent


def _on_line(points: Sequence[tuple[float, float]], at: float) -> float:
    """What lies at a place between points; beyond them, on the line through the nearest two."""
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (at,)), 1), len(points) - 1)
    (x, y), (next_x, next_y) = points[right - 1 : right + 1]
    return max(0.0, y + (next_y - y) * (at - x) / (next_x - x))
