"""Measurements of a model's layers."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_mgpu.engine.pipeline import microbatch
from lightning_mgpu.plan.ledger import Holders


@dataclass(frozen=True)
class Weights:
    """Bytes of a stage that do not depend on the batch.

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


class LayerRange(NamedTuple):
    """Range of a stage's layers, from the first to before the end."""

    first: int
    end: int


class Tied(NamedTuple):
    """A parameter that several layers use.

    Attributes:
        owner: The layer that it lies with.
        users: All of them.
        size: Its bytes.
    """

    owner: int
    users: frozenset[int]
    size: int


@dataclass(frozen=True)
class Sample:
    """Measurements with one number of micro-batches.

    Attributes:
        chunks: The number.
        size: Samples in a micro-batch.
        forward: Seconds of each layer for one micro-batch.
        backward: The same of backward.
        weights: Of backward, the seconds for gradients of weights that can come later.
        overhead: What a stage takes for a micro-batch beside its layers, forward and backward.
        own: Seconds that the step takes beside the module: loss, optimizer, data, hooks.
        values: Bytes of what layers make from a micro-batch, by who holds them.
    """

    chunks: int
    size: float
    forward: Sequence[float]
    backward: Sequence[float]
    weights: Sequence[float]
    overhead: tuple[float, float]
    own: float
    values: Mapping[Holders, float]


@dataclass(frozen=True)
class Profile:
    """All measurements of a model.

    Attributes:
        names: Of the layers, in order; stages can begin at each.
        weights: Of each layer.
        rest: Of what is not in any layer, and lies with the first.
        batch: Samples in a batch.
        least: The fewest samples that a micro-batch may have.
        samples: By the number of micro-batches.
        split_at: The layers that the user wants stages to begin at.
        tied: Parameters of several layers.
    """

    names: Sequence[str]
    weights: Sequence[Weights]
    rest: Weights
    batch: int
    least: int
    samples: Sequence[Sample]
    split_at: Sequence[str] = ()
    tied: Sequence[Tied] = ()

    def sizes(self, chunks: int) -> list[int]:
        """Samples in each micro-batch; fewer of them if there are too few samples."""
        return microbatch.sizes(self.batch, chunks, self.least)

    def own(self, chunks: int) -> float:
        """Seconds of a step outside of the module."""
        return on_line([(sample.chunks, sample.own) for sample in self.samples], chunks)

    def weights_of(self, span: LayerRange) -> Weights:
        """Bytes of a stage that do not depend on the batch."""
        own = sum(self.weights[slice(*span)], self.rest if span.first == 0 else Weights())
        layers = range(*span)
        borrowed = sum(
            tied.size for tied in self.tied if tied.owner not in layers and tied.users & {*layers}
        )
        # A copy, with a gradient that goes to the owner's.
        return own + Weights(parameters=2 * borrowed)


def on_line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolate linearly between points; extrapolate from the two nearest ones."""
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (at,)), 1), len(points) - 1)
    (x, y), (next_x, next_y) = points[right - 1 : right + 1]
    return max(0.0, y + (next_y - y) * (at - x) / (next_x - x))
