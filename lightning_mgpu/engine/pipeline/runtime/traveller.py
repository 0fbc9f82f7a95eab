"""State of one micro-batch on its way through the stages.

A thread runs the module's own `forward` for it::

    forward of micro-batch 2:   glue | unit | unit | glue | unit ...
    holds the turn of:          ---- stage 0 ----- | ---- stage 1 ----
    its graph:                  ---- segment 0 --- x ---- segment 1 --
                                                   ^ hand-over: leaves stand for what has been made

A unit is a submodule that belongs to a stage. When one of another stage is called, the micro-batch
gives up its turn, waits for that of the other stage, and goes on there. Whatever tensors come along
are cut off from the graph, and leaves stand for them, on the stage's device: where units are
called, and where the code between units (`glue`) uses them. `stand_ins` keeps account of that. So
each segment has a backward of its own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import next_node_number
from lightning_mgpu.engine.device import make_current
from lightning_mgpu.engine.pipeline.runtime.glue import Glue
from lightning_mgpu.engine.pipeline.runtime.segments import Graph, Segment, Stay
from lightning_mgpu.engine.pipeline.runtime.split_backward import SplitBackward
from lightning_mgpu.engine.pipeline.runtime.stand_ins import StandIns


class Traveller:
    """State of a micro-batch while it is computed.

    Args:
        chunk: Its number.
        devices: The device of each stage.
        enter: Waits for the turn of a stage.
        entered: Called when it has it.
        leave: Gives it up.
        borrow: Finds what stands for a parameter's leaf in a stage.
        defer: Of how many multiplications gradients of weights may be computed later than those of
            inputs; `None` for no such.
    """

    def __init__(
        self,
        chunk: int,
        devices: Sequence[torch.device],
        enter: "Callable[[Traveller, int], None]",
        entered: "Callable[[Traveller], None]",
        leave: "Callable[[Traveller], None]",
        borrow: Callable[[Tensor, int], Tensor | None],
        defer: int | None = None,
    ) -> None:
        self.chunk, self._devices = chunk, list(devices)
        self._enter, self._entered, self._leave = enter, entered, leave
        self.stage: int | None = None
        self.unit: str | None = None
        """The unit that is being computed, if any."""
        self.stays: list[Stay] = []
        self.graph = Graph()
        self.stand_ins = StandIns(self.graph, devices, borrow)
        self._inside: list[tuple[int, str]] = []
        self.recomputing: list[Any] = []
        """Of each unit that is being computed, what keeps its inputs, if anything."""
        self._glue = Glue(self.stand_ins.fit, self.stand_ins.fit_written)
        self._split = None if defer is None else SplitBackward(defer)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Context in which the calling thread computes this micro-batch."""
        _local.traveller = self
        try:
            with self._split or nullcontext(), self._glue:
                try:
                    yield
                finally:
                    self._glue.resume_all()  # what has been cancelled within a unit
        finally:
            _local.traveller = None
            self.rest()
            self.stand_ins.end()

    def split_again(self) -> SplitBackward | None:
        """A mode as that of the current stay, for what is computed again."""
        if self._split is None:
            return None
        return SplitBackward(self._split.least, self._split.into)

    def settle(self) -> None:
        """Discard what only forward needs."""
        # Without circles, or activations would wait for the garbage collector.
        del self._enter, self._entered, self._leave, self._glue, self._split, self.stand_ins

    def forget(self) -> None:
        """Discard what backward needs."""
        self.stays, self.graph = [], Graph()

    @property
    def device(self) -> torch.device:
        """Device of the current stage."""
        assert self.stage is not None
        return self._devices[self.stage]

    def go(self, stage: int) -> None:
        """Move to a stage, unless it is there already."""
        if stage == self.stage:
            return
        self.rest()
        self._enter(self, stage)
        self.stage = stage
        self.stays.append(Stay(stage))
        if self._split is not None:
            self._split.into = self.stays[-1].deferred
        self._entered(self)
        make_current(self.device)
        self.begin_segment()

    def rest(self) -> None:
        """Release the current stage."""
        if self.stage is not None:
            self._leave(self)
            self.stage = None

    def begin_segment(self, segment: Any = None) -> None:
        """Start a segment at the current stage.

        Args:
            segment: The segment, if it is none like others.
        """
        assert self.stage is not None
        segment = segment or Segment(self.stage)
        self.graph.add(segment, next_node_number())
        self.stays[-1].segments.append(segment)
        self.stand_ins.begin(self.stage)

    def enter_unit(self, name: str, stage: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Prepare for a submodule's call; returns its arguments on the stage's device."""
        self._inside.append((stage, name))
        self._glue.pause()
        self.unit = name
        self.go(stage)
        return self.stand_ins.bring(args), self.stand_ins.bring(kwargs) if kwargs else kwargs

    def abandon_unit(self) -> None:
        """Clean up after the submodule has failed."""
        self._inside.pop()
        self._glue.resume()

    def leave_unit(self, output: Any) -> Any:
        """Finish a submodule's call; returns its output for the caller."""
        self._inside.pop()
        self._glue.resume()
        self.unit = None
        if self._inside:
            stage, self.unit = self._inside[-1]
            if stage != self.stage:
                self.go(stage)
                output = self.stand_ins.bring(output)
        return output


def current() -> Traveller | None:
    """The micro-batch that the calling thread computes."""
    return getattr(_local, "traveller", None)


_local = threading.local()
