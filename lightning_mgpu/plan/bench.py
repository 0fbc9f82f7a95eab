"""Measure a module in one stage, and in one stage for each layer, on one device."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.device import synchronize
from lightning_mgpu.engine.pipeline import microbatch
from lightning_mgpu.engine.pipeline.check.parity import Parity
from lightning_mgpu.engine.pipeline.check.sample_run import SampleRun
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter, Splitting
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError, opened_until
from lightning_mgpu.engine.pipeline.partition.cutter import Cut, Cutter
from lightning_mgpu.engine.pipeline.partition.observation import observe
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.plan.ledger import Watched
from lightning_mgpu.plan.profile import Sample, Tied
from lightning_mgpu.plan.turn import Turn, sample_of

# Numbers of micro-batches that are measured; what others take lies between.
_COUNTS = 4
# Steps that may be in vain, as those with a batch of another size than the first.
_LOST = 50


class NothingMeasuredError(RuntimeError):
    """The steps cannot be measured."""


class Bench:
    """Run a module in turns of some steps, and measure them.

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
        step_batch: Callable[[], StepBatch],
    ) -> None:
        self._module, self._forward, self._made = module, forward, made
        self._device, self._threads = device, threads
        self._splitter, self._step_batch = splitter, step_batch
        self._turns: list[Turn] = []
        self._ahead: list[Turn] = []
        self._started: float | None = None
        self._lost = 0
        self.names: list[str] = []
        """Of the layers."""
        self.tensors: list[dict[str, Tensor]] = []
        """Parameters and buffers of each layer, by name."""
        self.tied: list[Tied] = []
        """Parameters of several layers."""
        self.batch = 0
        """Samples in a batch."""
        self.least = 1
        """The fewest samples that a micro-batch may have."""

    def close(self) -> None:
        """Stop the threads."""
        for turn in self._turns:
            turn.pipeline.close()

    def step(self) -> bool:
        """Start a step; the one before is over.

        Returns:
            Whether there is still something to be measured.

        Raises:
            NothingMeasuredError: Too many steps were in vain.
        """
        now = self._now()
        if self._started is not None and not self._took(now - self._started):
            self._lost += 1
        if self._lost > _LOST:
            raise NothingMeasuredError(
                f"in {self._lost} steps the module was not run, forward and backward, on a batch of"
                " the size of the first. Let `training_step` call the module that is to be cut, and"
                " batches be of one size."
            )
        self._started = self._now()
        return not self._turns or bool(self._ahead)

    def _took(self, seconds: float) -> bool:
        """Record the previous step's time; return whether it counts."""
        if not self._ahead:
            return False
        turn = self._ahead[0]
        counts = turn.take(seconds, self.batch)
        if turn.is_over:
            self._ahead.pop(0)
        return counts

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunks: Sequence[int], stages: int
    ) -> Any:
        """Run the module's `forward`, and measure it.

        Args:
            args: Its arguments.
            kwargs: The same by name.
            chunks: Numbers of micro-batches that are of interest.
            stages: The most stages that are of interest.
        """
        if not self._turns:
            self._prepare(args, kwargs, chunks, stages)
        if not self._ahead:
            return self._forward(*args, **kwargs)
        return self._ahead[0].run(args, kwargs)

    def samples(self) -> list[Sample]:
        """Measurements, available once `step` has returned `False`."""
        assert self._turns
        assert not self._ahead
        pairs = zip(self._turns[::2], self._turns[1::2], strict=True)
        return [sample_of(apart, whole, self.batch) for apart, whole in pairs]

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], chunks: Sequence[int], stages: int
    ) -> None:
        fixed = (*self._module.parameters(), *self._module.buffers())
        batch = self._step_batch()
        is_piece = self._splitter.pieces(self._forward, (args, kwargs), batch)
        call = CallArguments.of(self._forward, args, kwargs, is_piece)
        splitting = self._splitter.split(call, self._forward, batch, lambda: fixed)
        self.batch = splitting.size
        training = [m for m in batch_norm.layers_of(self._module.modules()) if m.training]
        self.least = 2 if training else 1
        possible = [n for n in sorted(set(chunks)) if len(self.sizes(n)) == n] or [1]
        apart, whole = self._cutters(call, splitting, stages)
        # Where it is known which layer is at work.
        apart.forward = watched = Watched(apart.forward)
        pipelines = (self._pipeline(apart), watched), (self._pipeline(whole), None)
        self._turns = [Turn(p, n, w) for n in _spread(possible) for p, w in pipelines]
        self._ahead = list(self._turns)

    def sizes(self, chunks: int) -> list[int]:
        """Samples in each micro-batch."""
        return microbatch.sizes(self.batch, chunks, self.least)

    def _cutters(
        self, call: CallArguments, splitting: Splitting, stages: int
    ) -> tuple[Cutter, Cutter]:
        """Cutters for a stage per layer, and for a single stage."""
        module, forward = self._module, self._forward
        if self._made is not None:
            self.names = [f"stage {index}" for index in range(len(self._made))]
            apart = Cutter(module, forward, len(self._made), made=self._made)
            assert apart.cut is not None
            self._know(apart.cut)
            return apart, Cutter(module, forward, 1, made=[_InARow(self._made)])
        trial = SampleRun(forward, call, splitting, [self._device])
        run = partial(trial.run, 0, splitting.size)
        unseen = Parity("off", "", [self._device]).unseen
        with unseen(dict(module.named_modules())), torch.no_grad():
            self.names = self._layers(run, stages)
            apart = Cutter(module, forward, len(self.names), self.names[1:])
            cut = apart.observe(run, 1)
        self._know(cut)
        return apart, Cutter(module, forward, 1, [])

    def _know(self, cut: Cut) -> None:
        """Record the owners of the parameters, from a cut with a stage for each layer."""
        self.tensors = cut.tensors
        users: dict[int, set[int]] = {}
        for module, layer in cut.units.values():
            for parameter in module.parameters():
                users.setdefault(id(parameter), set()).add(layer)
        self.tied = [
            Tied(layer, frozenset(users[id(tensor)]), tensor.nbytes)
            for layer, tensors in enumerate(cut.tensors)
            for tensor in tensors.values()
            if len(users.get(id(tensor), ())) > 1
        ]

    def _layers(self, run: Callable[[], Any], stages: int) -> list[str]:
        """Layers that a stage can begin with: as many as are of interest, if possible."""

        def size(name: str) -> float:
            return sum(p.nbytes for p in self._module.get_submodule(name).parameters())

        called, _ = observe(self._module, run)
        names = _apart([call.name for call in opened_until(called, stages, size).calls()])
        if not names:
            raise PartitionError(
                f"`{type(self._module).__name__}` has no layers that its `forward` calls, so it"
                ' cannot be cut. Choose another `module` (`module=""` is the LightningModule'
                " itself)."
            )
        return names

    def _pipeline(self, cutter: Cutter) -> Pipeline:
        return Pipeline(
            cutter,
            self._splitter,
            [self._device] * cutter.stages,
            chunks=Chunks(cutter.stages, 1),
            step_batch=self._step_batch,
            threads=self._threads,
            defer_weight_gradients=True,  # so that they are measured apart
            one_at_a_time=True,
        )

    def _now(self) -> float:
        synchronize([self._device])
        return time.perf_counter()


class _InARow(nn.Module):
    """The user's own stages, joined into one."""

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


def _apart(calls: Sequence[str]) -> list[str]:
    """The layers that a stage can begin with: none is called both before and after.

    Args:
        calls: The layers, in the order of their calls.
    """
    last = {name: index for index, name in enumerate(calls)}
    found: list[str] = []
    reached = -1
    for index, name in enumerate(calls):
        if index > reached:
            found.append(name)
        reached = max(reached, last[name])
    return found


def _spread(counts: Sequence[int]) -> list[int]:
    """Choose a few of many names, the first and the last among them."""
    if len(counts) <= _COUNTS:
        return list(counts)
    return [counts[round(i * (len(counts) - 1) / (_COUNTS - 1))] for i in range(_COUNTS)]
