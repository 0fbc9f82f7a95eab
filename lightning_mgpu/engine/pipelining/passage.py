"""One passage of a batch through the stages, forward and backward."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.notes import noted
from lightning_mgpu.engine.pipelining import schedule, values
from lightning_mgpu.engine.pipelining.links import Links
from lightning_mgpu.engine.pipelining.partition import Name, Partition, Stage
from lightning_mgpu.engine.randomness import Stream
from lightning_mgpu.engine.workers import Workers

__all__: list[str] = []

Checkpoint = Literal["never", "except_last", "always"]
Gradients = list[Tensor | None]


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
    ) -> None:
        self._partition, self._devices = partition, devices
        self._chunks: list[Mapping[Name, Tensor]] = list(chunks)
        self._streams, self._recorders = streams, recorders
        self._checkpoint, self._deferred = checkpoint, deferred
        self._trainable = trainable
        self._context = ThreadContext.capture()
        self.count = len(chunks)
        self.seconds = 0.0
        """What forward and backward have taken so far."""
        self.results: list[dict[Name, Any]] = [{} for _ in chunks]
        """Of each micro-batch, by name; emptied by the caller."""
        self.statistics: list[list[Any]] = [[] for _ in partition.stages]
        """For each stage and micro-batch, what its recorder took."""
        self._records: list[dict[int, _Record]] = [{} for _ in partition.stages]
        self._input_gradients: list[dict[tuple[Name, int], Gradients]] = [{} for _ in chunks]

    def forward(self, workers: Workers) -> None:
        """Compute `results`.

        Raises:
            BaseException: The first error of any stage.
        """
        links: Links[list[Any]] = Links()
        started = time.perf_counter()
        with self._recording(self._deferred):
            workers.run([partial(self._forward, s, links) for s in self._partition.stages])
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
        if len(self._records[0]) < self.count:
            raise RuntimeError(
                "Trying to backward through the graph a second time, but what it needs has been"
                " freed. Specify `retain_graph=True` if you need to backward through it again."
            )
        links: Links[dict[Name, Gradients]] = Links()
        started = time.perf_counter()
        try:
            with self._recording(self._checkpoint != "never"):
                workers.run(
                    [
                        partial(self._backward, stage, links, gradients, keep)
                        for stage in self._partition.stages
                    ]
                )
        except BaseException:
            self._records = [{} for _ in self._partition.stages]
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

    def _forward(self, stage: Stage, links: "Links[list[Any]]") -> None:
        order = schedule.of_stage(
            stage.index, schedule.forward(len(self._partition.stages), self.count)
        )
        for chunk in order:
            with noted(self.describe(stage.index, chunk)):
                inputs = self._received(stage, chunk, links)
                outputs = self._compute(stage, chunk, inputs)
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

    def _compute(self, stage: Stage, chunk: int, inputs: list[Any]) -> Sequence[Any]:
        stream = self._streams[stage.index][chunk]
        if not torch.is_grad_enabled():
            return self._checked(stage, inputs, stream)
        if self._is_checkpointed(chunk) and self._wants_gradient(stage, inputs):
            self._records[stage.index][chunk] = _Record(inputs, None)
            # What the stage does to its inputs in place must not be done to them twice.
            copies = [values.map_tensors(Tensor.clone, value) for value in inputs]
            with torch.no_grad(), stream.entered():
                outputs = stage.compute(copies)
            return [values.map_tensors(values.promise_gradient, value) for value in outputs]
        outputs = self._checked(
            stage, [values.map_tensors(values.enter, value) for value in inputs], stream
        )
        self._records[stage.index][chunk] = _Record(inputs, outputs)
        return outputs

    def _checked(self, stage: Stage, inputs: list[Any], stream: Stream) -> Sequence[Any]:
        versions = self._versions(stage, inputs)
        with stream.entered():
            outputs = stage.compute(inputs)
        if versions != self._versions(stage, inputs):
            raise RuntimeError(
                "The stage changes in place what others use, too: the caller, another stage or the"
                " output. Make it work on a copy (`inplace=False`, `x.clone()`)."
            )
        return outputs

    def _versions(self, stage: Stage, inputs: Sequence[Any]) -> list[int]:
        """How often each input that others use, too, has been written to."""
        partition = self._partition
        shared = [
            value
            for name, value in zip(stage.inputs, inputs, strict=True)
            if len(partition.consumers[name]) > 1 or name in partition.results
        ]
        return [
            t._version for value in shared for t in values.tensors(value) if not t.is_inference()
        ]

    def _wants_gradient(self, stage: Stage, inputs: Sequence[Any]) -> bool:
        arrived = (t for value in inputs for t in values.tensors(value))
        return self._trainable[stage.index] or any(t.requires_grad for t in arrived)

    def _is_checkpointed(self, chunk: int) -> bool:
        if self._checkpoint == "except_last":
            return chunk < self.count - 1
        return self._checkpoint == "always"

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
        stage: Stage,
        links: "Links[dict[Name, Gradients]]",
        gradients: Sequence[Mapping[Name, Gradients]],
        keep: bool,
    ) -> None:
        records = self._records[stage.index]
        order = schedule.of_stage(
            stage.index, schedule.backward(len(self._partition.stages), self.count)
        )
        for chunk in order:
            with noted(self.describe(stage.index, chunk) + ", in backward"):
                record = records[chunk] if keep else records.pop(chunk)
                inputs, outputs = record.inputs, record.outputs
                stream = self._streams[stage.index][chunk]
                if outputs is None:
                    inputs, outputs = self._again(stage, record, stream)
                arrived = self._gradients_of(stage, chunk, links, gradients[chunk])
                with stream.entered():
                    _run_backward(stage, outputs, arrived, keep)
                del outputs, arrived, record
                self._send_gradients(stage, chunk, inputs, links)

    def _again(
        self, stage: Stage, record: "_Record", stream: Stream
    ) -> tuple[list[Any], Sequence[Any]]:
        """Compute a checkpointed micro-batch once more, as it was, with a graph."""
        inputs = [values.map_tensors(values.copy, value) for value in record.inputs]
        with self._context.entered(self._devices[stage.index]):
            entered = [values.map_tensors(values.enter, value) for value in inputs]
            outputs = self._checked(stage, entered, stream.again())
        self._recorders[stage.index].take()  # counted when it was computed first
        return inputs, outputs

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


@dataclass
class _Record:
    """What a stage keeps of a micro-batch for backward."""

    inputs: list[Any]
    outputs: Sequence[Any] | None
    """`None` if they are to be computed again."""


def _run_backward(
    stage: Stage, outputs: Sequence[Any], arrived: Mapping[Name, list[Gradients]], keep: bool
) -> None:
    tensors: list[Tensor] = []
    seeds: list[Tensor] = []
    for name, value in zip(stage.outputs, outputs, strict=True):
        for index, tensor in enumerate(values.tensors(value)):
            if not tensor.requires_grad:
                continue
            for gradients in arrived[name]:
                gradient = gradients[index]
                if gradient is not None:
                    tensors.append(tensor)
                    seeds.append(gradient.to(tensor.device, non_blocking=True))
    if tensors:
        # One tensor may be named several times: its gradients add up.
        torch.autograd.backward(tensors, seeds, retain_graph=keep)
