"""Data of a Gantt chart: lanes and bars."""

from dataclasses import dataclass

KINDS = {
    "forward": "#2f6fa7",
    "recompute": "#9cc3e2",
    "backward": "#f0a23c",
    "weights": "#f7d78b",
}
"""What stages do, and in which colour."""

TEXT = {"forward": "white", "recompute": "black", "backward": "black", "weights": "black"}
"""The colour of what is written on them."""


@dataclass(frozen=True)
class Bar:
    """A stage's work on one micro-batch, in milliseconds."""

    stage: int
    chunk: int
    kind: str
    start: float
    length: float


@dataclass(frozen=True)
class Chart:
    """A Gantt chart of stages.

    Attributes:
        stages: The name of each.
        bars: Their work.
        milliseconds: How long all of it took.
        title: What it is, and how well the stages were used.
    """

    stages: list[str]
    bars: list[Bar]
    milliseconds: float
    title: tuple[str, str]
