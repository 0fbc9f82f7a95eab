"""A module run as a pipeline on one device: in one stage, and in one stage for each layer."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.pipelining import microbatch
from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.cutter import Cut, Cutter
from lightning_mgpu.engine.pipelining.graph_cut import layers, untied
from lightning_mgpu.engine.pipelining.ledger import ObservedCutter
from lightning_mgpu.engine.pipelining.pipeline import Pipeline
from lightning_mgpu.engine.pipelining.splitter import Splitter
from lightning_mgpu.engine.pipelining.timer import Timer
from lightning_mgpu.engine.pipelining.trace import Trace, UntraceableError
from lightning_mgpu.engine.pipelining.tuning import Chunks
from lightning_mgpu.plan.profile import Sample
from lightning_mgpu.plan.turn import Turn, sample_of

__all__: list[str] = []

# Numbers of micro-batches that are measured; what others take lies between.
_COUNTS = 4
# Steps that may be in vain, as those with a batch of another size than the first.
_LOST = 50


class NothingMeasuredError(RuntimeError):
    """Steps are not such that they could be measured."""


class Bench:
    """Runs a module in turns of some steps, and measures.

    Args:
        module: The module.
        forward: Its own `forward`.
        made: Stages that the user has made, if so.
        device: Where everything lies.
        threads: Intra-op threads.
        splitter: Tells which arguments carry the batch.
        step_batch: Tells the step's batch.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        made: Sequence[nn.Module] | None,
        device: torch.device,
        threads: int,
        splitter: Splitter,
        step_batch: Callable[[], Any],
    ) -> None:
        self._module, self._forward, self._made = module, forward, made
        self._device, self._splitter, self._step_batch = device, splitter, step_batch
        self._timer = Timer(device, threads)
        self._turns: list[Turn] = []
        self._ahead: list[Turn] = []
        self._started: float | None = None
        self._lost = 0
        self.names: list[str] = []
        """Of the layers."""
        self.tensors: list[dict[str, Tensor]] = []
        """Parameters and buffers of each layer, by name."""
        self.batch = 0
        """Samples in a batch."""
        self.least = 1
        """The fewest samples that a micro-batch may have."""

    def close(self) -> None:
        """End the thread."""
        for turn in self._turns:
            turn.pipeline.close()
        self._timer.close()

    def step(self) -> bool:
        """A step begins, and the one before is over.

        Returns:
            Whether there is still something to be measured.

        Raises:
            NothingMeasuredError: Too many steps were in vain.
        """
        now = time.perf_counter()
        if self._started is not None and not self._took(now - self._started):
            self._lost += 1
        if self._lost > _LOST:
            raise NothingMeasuredError(
                f"in {self._lost} steps the module was not run, forward and backward, on a batch of"
                " the size of the first. Let `training_step` call the module that is to be cut, and"
                " batches be of one size."
            )
        self._timer.restart()
        self._started = time.perf_counter()
        return not self._turns or bool(self._ahead)

    def _took(self, seconds: float) -> bool:
        """Take down what the step before has taken; whether it counts."""
        if not self._ahead:
            return False
        turn = self._ahead[0]
        counts = turn.take(seconds, self._timer, self.batch)
        if turn.is_over:
            self._ahead.pop(0)
        return counts

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunks: Sequence[int], stages: int
    ) -> Any:
        """What the module's `forward` returns.

        Args:
            args: Its arguments.
            kwargs: The same by name.
            chunks: Numbers of micro-batches that are of interest.
            stages: The most stages that are of interest.
        """
        if not self._turns:
            self._prepare(Call.of(self._forward, args, kwargs), chunks, stages)
        if not self._ahead:
            return self._forward(*args, **kwargs)
        return self._ahead[0].run(args, kwargs)

    def samples(self) -> list[Sample]:
        """What has been measured, once `step` has said that this is all."""
        assert self._turns
        assert not self._ahead
        pairs = zip(self._turns[::2], self._turns[1::2], strict=True)
        return [sample_of(apart, whole, self.batch) for apart, whole in pairs]

    def _prepare(self, call: Call, chunks: Sequence[int], stages: int) -> None:
        fixed = (*self._module.parameters(), *self._module.buffers())
        step_batch = self._step_batch()
        splitting = self._splitter.split(call, self._forward, step_batch, lambda: fixed)
        self.batch = splitting.size
        training = [m for m in batch_norm.layers_of(self._module.modules()) if m.training]
        self.least = 2 if training else 1
        possible = [n for n in sorted(set(chunks)) if len(self.sizes(n)) == n] or [1]
        if self._made is None:
            self.names = self._layers(call, stages)
            apart: Cutter = ObservedCutter(
                self._module, self._forward, len(self.names), self.names[1:]
            )
            whole = Cutter(self._module, self._forward, 1, [])
        else:
            self.names = [f"stage {index}" for index in range(len(self._made))]
            apart = ObservedCutter(
                self._module, self._forward, len(self._made), made=list(self._made)
            )
            whole = Cutter(self._module, self._forward, 1, made=[_InARow(self._made)])
        pipelines = [self._pipeline(apart), self._pipeline(whole)]
        self._turns = [Turn(p, count) for count in _spread(possible) for p in pipelines]
        self._ahead = list(self._turns)

    def sizes(self, chunks: int) -> list[int]:
        """Samples in each micro-batch."""
        return microbatch.sizes(self.batch, chunks, self.least)

    def _layers(self, call: Call, stages: int) -> list[str]:
        """The layers that a stage can begin with: as many as are of interest, if possible."""

        def recorded(at_least: int) -> Trace:
            return layers(self._module, self._forward, call.args, call.kwargs, at_least)

        try:
            calls = recorded(stages).calls()
        except UntraceableError:
            calls = recorded(1).calls()
        names = list(dict.fromkeys(calls))
        return [names[index] for index in untied(self._module, calls)]

    def _pipeline(self, cutter: Cutter) -> Pipeline:
        return Pipeline(
            cutter,
            self._splitter,
            [self._device] * cutter.stages,
            chunks=Chunks(cutter.stages, 1),
            step_batch=self._step_batch,
            on_cut=self._on_cut,
            workers=self._timer,
        )

    def _on_cut(self, cut: Cut) -> None:
        self._timer.expect_forward()
        if len(cut.tensors) == len(self.names):
            self.tensors = cut.tensors


class _InARow(nn.Module):
    """Stages that the user has made, as one."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self._stages = nn.ModuleList(stages)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self._stages
        value = first(*args, **kwargs)
        for stage in others:
            value = stage(*value) if type(value) is tuple else stage(value)
        return value


def _spread(counts: Sequence[int]) -> list[int]:
    """A few of many, the first and the last among them."""
    if len(counts) <= _COUNTS:
        return list(counts)
    return [counts[round(i * (len(counts) - 1) / (_COUNTS - 1))] for i in range(_COUNTS)]
