"""Compute a step part by part, with the gradients of the whole."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import Trainer
from lightning_mgpu.callbacks.log_override import logging_to
from lightning_mgpu.callbacks.step_record import Recorder, StepRecord, put_back
from lightning_mgpu.callbacks.step_replay import loss_of
from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.autograd import Gradients, graft
from lightning_mgpu.engine.batch import BatchLayout, Shard, gather, split
from lightning_mgpu.strategies.base.loader_hint import loader_hint
from lightning_mgpu.strategies.replicas.log_merging import BatchSizes, LogRecorder, replay
from lightning_mgpu.strategies.resume import rank_state


class StepInParts:
    """A training step that can be computed in parts, each with a backward of its own.

    The gradients are summed up, weighted by samples. The loss that comes out is one node of
    autograd's, whose backward hands the sums on, as if the whole had been computed::

        part 0: loss, gradients --+
        part 1: loss, gradients --+--> loss of the batch ---> backward: one gradient a parameter
        part 2: loss, gradients --+

    Args:
        trainer: The Trainer.
        own: The step itself, with the batch as its first argument.
    """

    def __init__(self, trainer: Trainer, own: Callable[..., Any]) -> None:
        self._trainer, self._own = trainer, own
        self._recorder = Recorder(trainer)
        self._layout = BatchLayout(lambda: loader_hint(trainer, "training_step"))
        self._batch_sizes = BatchSizes()
        self.record: StepRecord | None = None
        self._metrics: dict[str, Any] = {}
        self.drew = False
        """Whether the last step in parts has drawn random numbers."""

    def look_again(self) -> None:
        """Find the module's buffers anew, since they may have been replaced."""
        self._recorder.look_again()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a step begins with."""
        self.record = self._recorder.take(args, kwargs)
        self._metrics = rank_state.metric_states(self._trainer.lightning_module, ())

    def whole(self) -> Any:
        """Compute the step at once; what it logs takes effect if it comes to its end."""
        record, model, logged = self._begun(), self._trainer.lightning_module, LogRecorder()
        with logging_to(model, logged.log):
            output = self._own(*record.args, **record.kwargs)
        for (name, _), call in logged.calls.items():
            model.log(name, call.value, *call.args, **call.kwargs)
        return output

    def undo(self) -> None:
        """Put back what an attempt has changed: buffers, random states, metrics."""
        put_back(self._trainer, self._begun())
        rank_state.reset_metrics(self._trainer.lightning_module, self._metrics)

    def split(self, parts: int) -> list[Shard]:
        """The parts of the batch.

        Raises:
            ValueError: It cannot be split.
        """
        record = self._begun()
        return split(record.args[0], parts, 2 if self.trains_batch_norm() else 1, self._layout)

    def in_parts(self, shards: list[Shard], logs: bool = True) -> Any:
        """Compute the step part by part.

        Args:
            shards: The parts.
            logs: Whether what the parts log takes effect.

        Returns:
            What `training_step` returns for the whole batch.
        """
        record, model = self._begun(), self._trainer.lightning_module
        sums = _Sums([p for p in model.parameters() if p.requires_grad], _scale_of(self._trainer))
        outputs, recorders = [], []
        for shard in shards:
            recorders.append(LogRecorder())
            with logging_to(model, recorders[-1].log):
                output = self._own(shard.batch, *record.args[1:], **record.kwargs)
            sums.add(loss_of(output), shard.size)
            if isinstance(output, Mapping):
                outputs.append({key: _detached(output[key]) for key in output if key != "loss"})
            del output
        self.drew = record.random.has_moved()
        sizes = [shard.size for shard in shards]
        if logs:
            replay(recorders, sizes, model.log, lambda metric: metric, self._batch_sizes)
        loss = sums.loss()
        if loss is None or len(outputs) < len(shards):
            return loss
        return {"loss": loss, **(gather(outputs, sizes) if outputs[0] else {})}

    def trains_batch_norm(self) -> bool:
        """Return whether a layer normalises by the batch that it gets."""
        layers = batch_norm.layers_of(self._trainer.lightning_module.modules())
        return any(layer.training for layer in layers)

    def _begun(self) -> StepRecord:
        assert self.record is not None
        return self.record


class _Sums:
    """Losses and gradients of parts, weighted by samples.

    Args:
        parameters: Those to differentiate by.
        scale: By which losses are multiplied for backward, against underflow.
    """

    def __init__(self, parameters: list[Tensor], scale: float) -> None:
        self._parameters, self._scale = parameters, scale
        self._gradients: list[Tensor | None] = [None] * len(parameters)
        self._loss: Tensor | None = None
        self._weight = 0

    def add(self, loss: Tensor | None, size: int) -> None:
        """Add a part's; nothing for a part without a loss."""
        if loss is None:
            return
        value = loss.detach() * size
        self._loss = value if self._loss is None else self._loss + value
        self._weight += size
        if not loss.requires_grad:
            return
        found = torch.autograd.grad(
            loss, self._parameters, torch.full_like(loss, size * self._scale), allow_unused=True
        )
        for index, gradient in enumerate(found):
            known = self._gradients[index]
            if gradient is not None:
                self._gradients[index] = gradient if known is None else known + gradient

    def loss(self) -> Tensor | None:
        """The mean loss, with the sums behind it."""
        if self._loss is None:
            return None
        used = [i for i, gradient in enumerate(self._gradients) if gradient is not None]
        divisor = self._weight * self._scale

        def backward(upstream: Gradients, keep: bool) -> Gradients:
            factor = upstream[0]
            if factor is None:
                return [None] * len(used)
            gradients, found = self._gradients, []
            for index in used:
                gradient = gradients[index]
                assert gradient is not None
                found.append(gradient * (factor / divisor).to(gradient.device, gradient.dtype))
                if not keep:
                    gradients[index] = None
            return found

        return graft([self._loss / self._weight], [self._parameters[i] for i in used], backward)[0]


def _scale_of(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
