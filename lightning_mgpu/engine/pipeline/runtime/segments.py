"""Segments of a micro-batch's graph: each belongs to one stage and has its own backward."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.device import copied
from lightning_mgpu.engine.pipeline.profile.timeline import Kind
from lightning_mgpu.engine.pipeline.runtime import graph_position
from lightning_mgpu.engine.pipeline.runtime.weight_gradients import Deferred

Timed = Callable[[Kind], AbstractContextManager[Any]]


@dataclass(eq=False)
class Crossing:
    """A tensor on its way from one segment to a later one.

    Attributes:
        source: Where it was made.
        leaf: What stands for it later, whose gradient is the source's.
    """

    source: Tensor
    leaf: Tensor


@dataclass(eq=False)
class Segment:
    """Part of a micro-batch's graph that one stage computes without interruption.

    Attributes:
        stage: The stage.
        leaving: What later segments have of it.
        extra: What the caller has of it, with its gradients; set for backward.
    """

    stage: int
    leaving: list[Crossing] = field(default_factory=list)
    extra: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def backward(self, keep: bool, timed: Timed) -> None:
        """Accumulate gradients in leaves: of parameters, and of what came from earlier segments.

        Args:
            keep: Whether there may be another time.
            timed: A context for work of a kind.
        """
        roots, seeds = self._seeds(keep)
        if roots:
            with timed("backward"):
                torch.autograd.backward(roots, seeds, retain_graph=keep)

    def _seeds(self, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        roots, seeds = [], []
        for crossing in self.leaving:
            gradient = crossing.leaf.grad
            if gradient is not None:
                crossing.leaf.grad = None
                roots.append(crossing.source)
                seeds.append(copied(gradient, crossing.source.device))
        for tensor, gradient in self.extra:
            roots.append(tensor)
            seeds.append(copied(gradient, tensor.device))
        self.extra = []
        if not keep:
            self.leaving = []
        return roots, seeds


class Graph:
    """A micro-batch's segments, in order."""

    def __init__(self) -> None:
        self._segments: list[Any] = []
        self._starts: list[int] = []

    @property
    def start(self) -> int:
        """Position at which the current segment begins."""
        return self._starts[-1]

    def add(self, segment: Any, start: int) -> None:
        """Start a segment at a position."""
        self._segments.append(segment)
        self._starts.append(start)

    def at(self, made: int) -> Any:
        """Segment that a position belongs to; `None` if it is before all."""
        index = bisect_right(self._starts, made) - 1
        return self._segments[index] if index >= 0 else None

    def of(self, tensor: Tensor) -> Any:
        """Segment in which a tensor with a graph was made."""
        made = graph_position.of(tensor)
        assert made is not None
        return self.at(made)


@dataclass(eq=False)
class Stay:
    """The segments of one visit at a stage.

    Attributes:
        stage: The stage.
        segments: In order.
        deferred: What their backward leaves for later.
    """

    stage: int
    segments: list[Any] = field(default_factory=list)
    deferred: Deferred = field(default_factory=Deferred)

    def backward(self, keep: bool, timed: Timed) -> None:
        """Run backward of the segments, last to first."""
        for segment in reversed(self.segments):
            segment.backward(keep, timed)
