"""Execution of one batch on all stages, forward and backward."""

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.device import on_device
from lightning_mgpu.engine.error_notes import noted
from lightning_mgpu.engine.pipeline.profile.recording import Recording
from lightning_mgpu.engine.pipeline.profile.timeline import Kind
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint, computed_again
from lightning_mgpu.engine.pipeline.runtime.parameter_swap import ParameterSwap
from lightning_mgpu.engine.pipeline.runtime.recompute import Recomputed, is_worth_it
from lightning_mgpu.engine.pipeline.runtime.recurrent_state import Memory
from lightning_mgpu.engine.pipeline.runtime.segments import Stay
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller, current
from lightning_mgpu.engine.pipeline.runtime.turns import Turns
from lightning_mgpu.engine.pipeline.runtime.units import Units
from lightning_mgpu.engine.pipeline.runtime.weight_gradients import WeightGradients
from lightning_mgpu.engine.randomness import Stream
from lightning_mgpu.engine.workers import Workers

Gradients = list[tuple[Tensor, Tensor]]
"""Tensors that a micro-batch has made, with their gradients."""

# How often a stage that waits looks whether it has been cancelled.
_POLL_SECONDS = 0.05


class Execution:
    """Run micro-batches through the stages, and their gradients back.

    Forward is one task for each micro-batch that is on its way at once, which runs the module's
    `forward` for one after another. Backward is one a door, which works on the micro-batches'
    segments, the last first.

    Args:
        units: What belongs to stages.
        devices: The device of each stage.
        way: The stages that a micro-batch is expected to visit, in order.
        calls: Computes a micro-batch, for each.
        streams: Random numbers for each micro-batch.
        checkpoint: Of each stage, which micro-batches' units are computed again in backward.
        memory_of: What a unit remembers.
        writers: Units that cannot be computed again, since they write to what they are called with.
        recorder: Keeps batch normalisation from updating running statistics.
        deferred: Whether those are kept for the caller, or updated with each micro-batch.
        swap: What stands for parameters, if there is anything.
        recording: Records when stages work.
        doors: Of each stage, what it shares with others: of those, one works at a time.
        defer: Of how many multiplications the gradients of weights are computed when a door has
            nothing else to do, at the latest at the end; `None` for no such.
    """

    def __init__(
        self,
        units: Units,
        devices: Sequence[torch.device],
        way: Sequence[int],
        calls: Sequence[Callable[[], Any]],
        streams: Sequence[Stream],
        checkpoint: Sequence[Checkpoint],
        memory_of: Callable[[nn.Module], Memory],
        writers: frozenset[int],
        recorder: Recorder,
        deferred: bool,
        swap: ParameterSwap | None,
        recording: Recording | None,
        doors: Sequence[int],
        defer: int | None,
    ) -> None:
        self._units, self._devices, self._way = units, devices, list(way)
        self._calls, self._streams, self._memory_of = list(calls), streams, memory_of
        self.count = len(calls)
        self._checkpointed = [computed_again(of_stage, self.count) for of_stage in checkpoint]
        self._writers = writers
        self._recorder, self._deferred = recorder, deferred
        way_of_doors = tuple(doors[stage] for stage in self._way)
        plan = schedule.timetable(way_of_doors, self.count, max(doors) + 1)
        self.at_once = plan.at_once
        """How many threads compute micro-batches, one after another."""
        self._door_of, self._turns = doors, Turns(plan.orders, doors)
        self._log: list[list[tuple[int, Stay]]] = [[] for _ in plan.orders]
        self._recording = recording
        self._call = recording.begin_call(self.count, len(devices)) if recording else 0
        self._since: dict[int, Any] = {}
        self.travellers = [
            Traveller(
                chunk,
                devices,
                self._enter,
                self._entered,
                self._leave,
                swap.borrow if swap is not None else _nothing,
                defer if swap is not None else None,
            )
            for chunk in range(self.count)
        ]
        self.seconds = 0.0
        """What forward and backward have taken so far."""
        self.results: list[Any] = [None] * self.count
        """What each micro-batch has returned; emptied by the caller."""
        self.statistics: list[list[Any]] = []
        """For each micro-batch, what batch normalisation has seen."""
        self._is_spent = False

    @property
    def defers(self) -> bool:
        """Return whether any gradient of a weight may be computed later."""
        found = (stay.deferred.is_used for t in self.travellers for stay in t.stays)
        return any(self._checkpointed) or any(found)

    @property
    def way(self) -> list[int]:
        """The stages that the first micro-batch has visited."""
        return [stay.stage for stay in self.travellers[0].stays]

    def forward(self, workers: Workers) -> None:
        """Compute `results`.

        Raises:
            BaseException: The first error of any micro-batch.
        """
        started = time.perf_counter()
        recompute = self._recomputed if any(self._checkpointed) else None
        with self._units.attached(recompute), self._recorded(self._deferred):
            context = ThreadContext.capture(self._devices)
            task = partial(self._forward, iter(range(self.count)), context)
            workers.run([task] * self.at_once, abandon=self._turns.close)
            if self._deferred:
                self.statistics = self._recorder.take_parts(self.count)
        self.seconds += time.perf_counter() - started
        self._calls = []

    def backward(self, workers: Workers, gradients: Sequence[Gradients], keep: bool) -> None:
        """Accumulate gradients in the leaves of the stages and of the arguments.

        Args:
            workers: The stages' threads.
            gradients: For each micro-batch.
            keep: Whether there may be another time.

        Raises:
            RuntimeError: It is not the first time, and the time before did not keep the graph.
        """
        if self._is_spent:
            raise RuntimeError(
                "Trying to backward through the graph a second time, but what it needs has been"
                " freed. Specify `retain_graph=True` if you need to backward through it again."
            )
        self._is_spent = not keep
        for traveller, of_chunk in zip(self.travellers, gradients, strict=True):
            for tensor, gradient in of_chunk:
                traveller.graph.of(tensor).extra.append((tensor, gradient))
        started = time.perf_counter()
        ready = {id(stay): queue.SimpleQueue[None]() for of in self._log for _, stay in of}
        for traveller in self.travellers:
            ready[id(traveller.stays[-1])].put(None)
        try:
            with self._units.attached(), self._counted():
                later = [WeightGradients(self._at_weights) for _ in self._log]
                workers.run(
                    [
                        partial(self._backward, door, ready, keep, of_door)
                        for door, of_door in enumerate(later)
                    ]
                )
                for of_door in later:
                    of_door.deliver()
        except BaseException:
            self.forget()
            raise
        if not keep:
            self.forget()
        self.seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Discard what only forward needs."""
        for traveller in self.travellers:
            traveller.settle()

    def forget(self) -> None:
        """Discard what backward needs."""
        self._is_spent = True
        self._log = []
        for traveller in self.travellers:
            traveller.forget()

    def describe(self, stage: int | None, chunk: int) -> str:
        """Format a stage and a micro-batch for a message."""
        where = (
            "before the first stage"
            if stage is None
            else f"stage {stage} of {len(self._devices)} on {self._devices[stage]}"
        )
        return f"{where}, micro-batch {chunk} of {self.count}"

    @contextmanager
    def _recorded(self, wanted: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if wanted:
                self._recorder.attach()
                stack.callback(self._recorder.take)
                stack.callback(self._recorder.detach)
            yield

    def _counted(self) -> AbstractContextManager[None]:
        """Context in which recomputation does not update running statistics again.

        Several stages may recompute at once for the user's activation checkpointing.
        """
        if any(self._checkpointed):
            return self._recorded(True)
        return batch_norm.aside(self._recorder.layers)

    def _forward(self, chunks: Iterator[int], context: ThreadContext) -> None:
        for chunk in chunks:  # (of which several threads take: to get the next is one step)
            # What one leaves behind in the thread, the next must not find.
            with context.entered(self._devices[0]):
                context.variables.copy().run(self._compute, chunk)

    def _compute(self, chunk: int) -> None:
        traveller = self.travellers[chunk]

        def where() -> str:
            unit = f", in `{traveller.unit}`" if traveller.unit else ""
            return self.describe(traveller.stage, chunk) + unit

        try:
            with self._streams[chunk].entered(), traveller.entered(), noted(where):
                traveller.go(self._way[0])
                self.results[chunk] = self._calls[chunk]()
        finally:
            self._turns.finish(chunk)

    def _enter(self, traveller: Traveller, stage: int) -> None:
        self._turns.enter(traveller.chunk, stage, len(traveller.stays))

    def _entered(self, traveller: Traveller) -> None:
        """Start a micro-batch's turn."""
        stay = traveller.stays[-1]
        self._log[self._door_of[stay.stage]].append((traveller.chunk, stay))
        if self._recording is not None:
            self._since[traveller.chunk] = self._recording.now(stay.stage)

    def _leave(self, traveller: Traveller) -> None:
        stage = traveller.stage
        assert stage is not None
        if self._recording is not None:
            since = self._since.pop(traveller.chunk)
            self._recording.add(stage, traveller.chunk, self._call, "forward", since)
        self._turns.leave(stage)

    def _recomputed(
        self, traveller: Traveller, module: nn.Module, args: Any, kwargs: Any
    ) -> Recomputed | None:
        if not torch.is_grad_enabled() or traveller.stage is None:
            return None
        if traveller.chunk >= self._checkpointed[traveller.stage]:
            return None
        if any(traveller.recomputing) or id(module) in self._writers:
            return None
        if not is_worth_it(module, args, kwargs):
            return None
        stream = self._streams[traveller.chunk]
        return Recomputed(module, self._memory_of(module), stream)

    def _timed(self, stage: int, chunk: int, kind: Kind) -> AbstractContextManager[None]:
        if self._recording is None:
            return nullcontext()
        return self._recording.recorded(stage, chunk, self._call, kind)

    def _backward(
        self,
        door: int,
        ready: Mapping[int, "queue.SimpleQueue[None]"],
        keep: bool,
        later: WeightGradients,
    ) -> None:
        for chunk, stay in reversed(self._log[door]):
            _wait(ready[id(stay)], later.work)
            stage = stay.stage
            where = self.describe(stage, chunk) + ", in backward"
            with (
                on_device(self._devices[stage]),
                noted(where),
                self._streams[chunk].entered(),
                stay.deferred.collecting(),
            ):
                stay.backward(keep, partial(self._timed, stage, chunk))
            later.leave(stage, chunk, stay.deferred.take())
            stays = self.travellers[chunk].stays
            before = stays.index(stay) - 1
            if before >= 0:
                ready[id(stays[before])].put(None)
            later.work_off(self._visits_left(stage, chunk) if before >= 0 else 0)
        later.work_off(0)

    def _visits_left(self, stage: int, chunk: int) -> int:
        """Of how many visits gradients may be left; of none at a first one: nobody waits."""
        if chunk < self._checkpointed[stage]:
            return schedule.DEFERRED_RECOMPUTED_VISITS
        return schedule.DEFERRED_VISITS

    @contextmanager
    def _at_weights(self, stage: int, chunk: int) -> Iterator[None]:
        where = self.describe(stage, chunk) + ", in backward"
        with on_device(self._devices[stage]), noted(where), self._timed(stage, chunk, "weights"):
            yield


def _wait(signal: "queue.SimpleQueue[None]", meanwhile: Callable[[], bool]) -> None:
    """Wait for a signal.

    Args:
        signal: What is waited for.
        meanwhile: Does a piece of other work, and tells whether there is more.
    """
    has_work = True
    while True:
        try:
            # A thread can only be told to stop between two steps in Python.
            signal.get(timeout=0 if has_work else _POLL_SECONDS)
            return
        except queue.Empty:
            has_work = meanwhile()


def _nothing(leaf: Tensor, stage: int) -> None:
    """No parameter has a replacement."""


def part_at_hand() -> int:
    """Number of the micro-batch that the calling thread computes."""
    traveller = current()
    return -1 if traveller is None else traveller.chunk
