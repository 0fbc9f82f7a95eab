"""One passage of a batch through the stages, forward and backward."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.notes import noted
from lightning_mgpu.engine.pipelining import schedule, values
from lightning_mgpu.engine.pipelining.links import Links
from lightning_mgpu.engine.pipelining.memory import Memory
from lightning_mgpu.engine.pipelining.partition import Name, Partition, Stage
from lightning_mgpu.engine.pipelining.recording import RecordedWork, Recording
from lightning_mgpu.engine.pipelining.stage_work import Checkpoint, Gradients, StageWork
from lightning_mgpu.engine.randomness import Stream
from lightning_mgpu.engine.workers import Workers

__all__: list[str] = []


class Passage:
    """Micro-batches on their way through the stages, and their gradients on the way back.

    Each stage is one task, which works on all micro-batches in the order of the timetable; what it
    needs from other stages comes through queues.

    Args:
        partition: The stages.
        devices: The device of each.
        chunks: The arguments' tensors of each micro-batch, by name.
        streams: Random numbers for each stage and micro-batch.
        checkpoint: Which micro-batches keep only their inputs, and are computed again in backward.
        recorders: For each stage, what keeps its batch normalisation from updating running
            statistics.
        deferred: Whether those are kept for the caller, or updated with each micro-batch.
        trainable: For each stage, whether any of its parameters wants a gradient.
        protected: Arguments that stages must not write to.
        memories: For each stage, what its modules remember.
        recording: Takes down when stages work.
    """

    def __init__(
        self,
        partition: Partition,
        devices: Sequence[torch.device],
        chunks: Sequence[Mapping[Name, Tensor]],
        streams: Sequence[Sequence[Stream]],
        checkpoint: Checkpoint,
        recorders: Sequence[Recorder],
        deferred: bool,
        trainable: Sequence[bool],
        protected: frozenset[Name],
        memories: Sequence[Memory],
        recording: Recording | None = None,
    ) -> None:
        self._partition, self._devices = partition, devices
        self._chunks: list[Mapping[Name, Tensor]] = list(chunks)
        self._recorders, self._deferred = recorders, deferred
        self._recomputes = checkpoint != "never"
        make: Callable[..., StageWork] = StageWork
        if recording is not None:
            make = partial(RecordedWork, recording, recording.begin_call(len(chunks)))
        self._works = [
            make(
                *(partition, i, devices[i], streams[i], recorders[i], trainable[i], checkpoint),
                *(protected, memories[i]),
            )
            for i in range(len(partition.stages))
        ]
        self.count = len(chunks)
        self.seconds = 0.0
        """What forward and backward have taken so far."""
        self.results: list[dict[Name, Any]] = [{} for _ in chunks]
        """Of each micro-batch, by name; emptied by the caller."""
        self.statistics: list[list[Any]] = [[] for _ in partition.stages]
        """For each stage and micro-batch, what its recorder took."""
        self._input_gradients: list[dict[tuple[Name, int], Gradients]] = [{} for _ in chunks]

    def forward(self, workers: Workers) -> None:
        """Compute `results`.

        Raises:
            BaseException: The first error of any stage.
        """
        links: Links[list[Any]] = Links()
        started = time.perf_counter()
        with self._recording(self._deferred):
            workers.run([partial(self._forward, work, links) for work in self._works])
        self.seconds += time.perf_counter() - started
        self._chunks = [{} for _ in self._chunks]

    def backward(
        self, workers: Workers, gradients: Sequence[Mapping[Name, Gradients]], keep: bool
    ) -> list[dict[tuple[Name, int], Gradients]]:
        """Accumulate gradients in the leaves of the stages.

        Args:
            workers: The stages' threads.
            gradients: For each micro-batch, those of the tensors in each result.
            keep: Whether there may be another time.

        Returns:
            For each micro-batch, the gradients of the arguments, for each stage that uses them.

        Raises:
            RuntimeError: It is not the first time, and the time before did not keep the graph.
        """
        if len(self._works[0]) < self.count:
            raise RuntimeError(
                "Trying to backward through the graph a second time, but what it needs has been"
                " freed. Specify `retain_graph=True` if you need to backward through it again."
            )
        links: Links[dict[Name, Gradients]] = Links()
        started = time.perf_counter()
        try:
            with self._recording(self._recomputes):
                workers.run(
                    [partial(self._backward, work, links, gradients, keep) for work in self._works]
                )
        except BaseException:
            for work in self._works:
                work.forget()
            raise
        self.seconds += time.perf_counter() - started
        taken, self._input_gradients = self._input_gradients, [{} for _ in range(self.count)]
        return taken

    def describe(self, stage: int, chunk: int) -> str:
        """A stage and a micro-batch, in words."""
        return (
            f"stage {stage} of {len(self._partition.stages)} on {self._devices[stage]},"
            f" micro-batch {chunk} of {self.count}"
        )

    def _recording(self, wanted: bool) -> AbstractContextManager[Any]:
        if not wanted:
            return nullcontext()
        stack = ExitStack()
        for recorder in self._recorders:
            recorder.attach()
            stack.callback(recorder.take)
            stack.callback(recorder.detach)
        return stack

    def _forward(self, work: StageWork, links: "Links[list[Any]]") -> None:
        stage = work.stage
        order = schedule.of_stage(
            stage.index, schedule.forward(len(self._partition.stages), self.count)
        )
        for chunk in order:
            with noted(self.describe(stage.index, chunk)):
                outputs = work.forward(chunk, self._received(stage, chunk, links))
                self._send(stage, chunk, outputs, links)
            if self._deferred:
                self.statistics[stage.index].append(self._recorders[stage.index].take())

    def _received(self, stage: Stage, chunk: int, links: "Links[list[Any]]") -> list[Any]:
        """A stage's inputs, on its device and cut off from the graphs that they come from."""
        found: dict[Name, Any] = dict(self._chunks[chunk])
        for producer in range(stage.index):
            names = self._partition.passed(producer, stage.index)
            if names:
                found.update(zip(names, links.get(producer, stage.index), strict=True))
        device = self._devices[stage.index]

        def arrive(tensor: Tensor) -> Tensor:
            return values.cut_off(tensor, device)

        return [values.map_tensors(arrive, found[name]) for name in stage.inputs]

    def _send(
        self, stage: Stage, chunk: int, outputs: Sequence[Any], links: "Links[list[Any]]"
    ) -> None:
        made = dict(zip(stage.outputs, outputs, strict=True))
        for consumer in range(stage.index + 1, len(self._partition.stages)):
            names = self._partition.passed(stage.index, consumer)
            if names:
                links.put(stage.index, consumer, [made[name] for name in names])
        for name in self._partition.results:
            if name in made:
                self.results[chunk][name] = made[name]

    def _backward(
        self,
        work: StageWork,
        links: "Links[dict[Name, Gradients]]",
        gradients: Sequence[Mapping[Name, Gradients]],
        keep: bool,
    ) -> None:
        stage = work.stage
        order = schedule.of_stage(
            stage.index, schedule.backward(len(self._partition.stages), self.count)
        )
        for chunk in order:
            with noted(self.describe(stage.index, chunk) + ", in backward"):
                inputs, outputs = work.recall(chunk, keep)
                arrived = self._gradients_of(stage, chunk, links, gradients[chunk])
                work.backward(chunk, outputs, arrived, keep)
                del outputs, arrived
                self._send_gradients(stage, chunk, inputs, links)

    def _gradients_of(
        self,
        stage: Stage,
        chunk: int,
        links: "Links[dict[Name, Gradients]]",
        of_results: Mapping[Name, Gradients],
    ) -> dict[Name, list[Gradients]]:
        """What arrives for each output of a stage, from the caller and from later stages."""
        arrived: dict[Name, list[Gradients]] = {name: [] for name in stage.outputs}
        for name in stage.outputs:
            if name in of_results:
                arrived[name].append(of_results[name])
        for consumer in range(stage.index + 1, len(self._partition.stages)):
            if self._partition.passed(stage.index, consumer):
                for name, of_tensors in links.get(consumer, stage.index).items():
                    arrived[name].append(of_tensors)
        return arrived

    def _send_gradients(
        self,
        stage: Stage,
        chunk: int,
        inputs: Sequence[Any],
        links: "Links[dict[Name, Gradients]]",
    ) -> None:
        taken = {n: values.take(value) for n, value in zip(stage.inputs, inputs, strict=True)}
        for producer in range(stage.index):
            names = self._partition.passed(producer, stage.index)
            if names:
                links.put(stage.index, producer, {name: taken[name] for name in names})
        for name in self._partition.arguments:
            if name in taken:
                self._input_gradients[chunk][name, stage.index] = taken[name]
