"""A stage's own work on its micro-batches; what others send comes from outside."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.context import ThreadContext
from lightning_mgpu.engine.pipelining import values
from lightning_mgpu.engine.pipelining.memory import Memory, Moment
from lightning_mgpu.engine.pipelining.partition import Name, Partition
from lightning_mgpu.engine.randomness import Stream

__all__: list[str] = []

Checkpoint = Literal["never", "except_last", "always"]
Gradients = list[Tensor | None]


class StageWork:
    """Computes micro-batches, and their gradients; keeps what backward needs in between.

    Args:
        partition: The stages.
        index: Which of them this is.
        device: Its device.
        streams: Random numbers for each micro-batch.
        recorder: What keeps its batch normalisation from updating running statistics.
        trainable: Whether any of its parameters wants a gradient.
        checkpoint: Which micro-batches keep only their inputs, and are computed again in backward.
        protected: Arguments that must not be written to, since others see them too.
        memory: What its modules remember from call to call.
    """

    def __init__(
        self,
        partition: Partition,
        index: int,
        device: torch.device,
        streams: Sequence[Stream],
        recorder: Recorder,
        trainable: bool,
        checkpoint: Checkpoint,
        protected: frozenset[Name],
        memory: Memory,
    ) -> None:
        self.stage, self._device = partition.stages[index], device
        self._streams, self._recorder, self._trainable = streams, recorder, trainable
        self._context = ThreadContext.capture()
        self._checkpointed = {"never": 0, "except_last": len(streams) - 1, "always": len(streams)}[
            checkpoint
        ]
        # Inputs and outputs of each micro-batch; no outputs if they are to be computed again.
        self._kept: dict[int, tuple[list[Any], Sequence[Any] | None]] = {}
        self._memory = memory
        self._moments: dict[int, Moment] = {}
        self._shared = {
            position
            for position, name in enumerate(self.stage.inputs)
            if len(partition.consumers[name]) > 1 or name in partition.results or name in protected
        }
        self._arguments = {
            position
            for position, name in enumerate(self.stage.inputs)
            if name in partition.arguments
        }

    def __len__(self) -> int:
        """How many micro-batches wait for their backward."""
        return len(self._kept)

    def forget(self) -> None:
        """Have no backward any more."""
        self._kept.clear()
        self._moments.clear()

    def forward(self, chunk: int, inputs: list[Any]) -> Sequence[Any]:
        """Compute a micro-batch's outputs from leaves of their own."""
        stream = self._streams[chunk]
        if not torch.is_grad_enabled():
            return self._computed(inputs, stream)
        if chunk < self._checkpointed and self._wants_gradient(inputs):
            # What the stage does to its inputs in place must not be done to them twice.
            copies = [values.map_tensors(Tensor.clone, value) for value in inputs]
            before = self._memory.before()
            with torch.no_grad():
                outputs = self._computed(copies, stream)
                self._kept[chunk] = self._unwritten(inputs, copies), None
            self._moments[chunk] = self._memory.after(before)
            return [values.map_tensors(values.promise_gradient, value) for value in outputs]
        outputs = self._computed([values.map_tensors(values.enter, v) for v in inputs], stream)
        self._kept[chunk] = inputs, outputs
        return outputs

    def recall(self, chunk: int, keep: bool) -> tuple[list[Any], Sequence[Any]]:
        """A micro-batch's inputs and outputs, the latter with a graph.

        Args:
            chunk: The micro-batch.
            keep: Whether there may be another time.
        """
        inputs, outputs = self._kept[chunk] if keep else self._kept.pop(chunk)
        return (inputs, outputs) if outputs is not None else self._again(chunk, inputs)

    def backward(
        self,
        chunk: int,
        outputs: Sequence[Any],
        arrived: Mapping[Name, list[Gradients]],
        keep: bool,
    ) -> None:
        """Accumulate gradients in the leaves: the parameters' and those of a micro-batch's inputs.

        Args:
            chunk: The micro-batch.
            outputs: Its outputs.
            arrived: The gradients of each output, from each place that uses it.
            keep: Whether there may be another time.
        """
        tensors: list[Tensor] = []
        seeds: list[Tensor] = []
        for name, value in zip(self.stage.outputs, outputs, strict=True):
            for index, tensor in enumerate(values.tensors(value)):
                if not tensor.requires_grad:
                    continue
                for gradients in arrived[name]:
                    gradient = gradients[index]
                    if gradient is not None:
                        tensors.append(tensor)
                        seeds.append(gradient.to(tensor.device, non_blocking=True))
        if tensors:
            with self._streams[chunk].entered():
                # One tensor may be named several times: its gradients add up.
                torch.autograd.backward(tensors, seeds, retain_graph=keep)

    def _again(self, chunk: int, inputs: list[Any]) -> tuple[list[Any], Sequence[Any]]:
        """Compute a checkpointed micro-batch once more, as it was, with a graph."""
        inputs = [values.map_tensors(values.copy, value) for value in inputs]
        moment = self._moments[chunk]
        with self._context.entered(self._device), self._memory.rewound(moment):
            entered = [values.map_tensors(values.enter, value) for value in inputs]
            outputs = self._computed(entered, self._streams[chunk].again())
        self._recorder.take()  # counted when it was computed first
        return inputs, outputs

    def _computed(self, inputs: list[Any], stream: Stream) -> Sequence[Any]:
        versions = self._versions(inputs)
        with stream.entered():
            outputs = self.stage.compute(inputs)
        if versions != self._versions(inputs):
            raise RuntimeError(
                "The stage changes in place what others use, too: the caller, another stage or the"
                " output. Make it work on a copy (`inplace=False`, `x.clone()`)."
            )
        return outputs

    def _unwritten(self, inputs: list[Any], copies: Sequence[Any]) -> list[Any]:
        """The inputs as they were before the stage has written to copies of them.

        The caller's tensor is written to as it would be on one device.
        """
        kept = list(inputs)
        for position in self._arguments:
            if any(t._version > 0 for t in values.tensors(copies[position])):
                kept[position] = values.map_tensors(values.copy, inputs[position])
                pairs = zip(
                    values.tensors(inputs[position]), values.tensors(copies[position]), strict=True
                )
                for tensor, written in pairs:
                    tensor.copy_(written)
        return kept

    def _versions(self, inputs: Sequence[Any]) -> list[int]:
        """How often each input that others use, too, has been written to."""
        shared = (inputs[position] for position in sorted(self._shared))
        return [
            t._version for value in shared for t in values.tensors(value) if not t.is_inference()
        ]

    def _wants_gradient(self, inputs: Sequence[Any]) -> bool:
        arrived = (t for value in inputs for t in values.tensors(value))
        return self._trainable or any(t.requires_grad for t in arrived)
