"""A module's `forward` in stages on several devices, micro-batch by micro-batch."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.autograd import Gradients, graft
from lightning_mgpu.engine.error_notes import add_note
from lightning_mgpu.engine.pipeline import microbatch as mb
from lightning_mgpu.engine.pipeline.check.parity import Parity
from lightning_mgpu.engine.pipeline.check.sample_run import SampleRun
from lightning_mgpu.engine.pipeline.first_call import FirstCall
from lightning_mgpu.engine.pipeline.inputs.assigned import Assigned
from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter, Splitting
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.named_modules import named_once
from lightning_mgpu.engine.pipeline.outputs.joining import Layouts, Undecided
from lightning_mgpu.engine.pipeline.outputs.output import Output
from lightning_mgpu.engine.pipeline.partition.cutter import Cut, Cutter
from lightning_mgpu.engine.pipeline.profile.recording import Recording
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint, per_stage
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.engine.pipeline.runtime.deferral import Defer, Deferral
from lightning_mgpu.engine.pipeline.runtime.execution import Execution, part_at_hand
from lightning_mgpu.engine.pipeline.runtime.microbatch_arguments import MicrobatchArguments
from lightning_mgpu.engine.pipeline.runtime.parameter_swap import ParameterSwap
from lightning_mgpu.engine.pipeline.runtime.recurrent_state import Memory
from lightning_mgpu.engine.pipeline.runtime.units import Units
from lightning_mgpu.engine.randomness import RandomStreams, Stream
from lightning_mgpu.engine.workers import Workers, available_cores

_WAY_OUT = (
    "(`chunks=1` works for every module: the batch stays whole, but stages work one after another.)"
)


class Pipeline:
    """Replacement for a module's `forward` with the same results.

    Args:
        cutter: Cuts the module.
        splitter: Tells which arguments carry the batch.
        devices: One for each stage; those of the first stages again for later ones.
        chunks: How many micro-batches; a batch with fewer samples makes fewer.
        checkpoint: Which micro-batches keep only the inputs of units, which are computed again in
            backward: ``"never"``, ``"except_last"``, ``"always"``, of each stage or of all. What
            the cutter has chosen goes before.
        deferred_batch_norm: Whether running statistics are updated once, with those of the whole
            batch, or with each micro-batch.
        step_batch: Tells the batch of the step that calls; default: it is not known.
        parity: Compares a few samples whole and in two micro-batches; default: no check at all.
        on_cut: Called after the module has been cut, before anything is computed.
        threads: Intra-op threads of each device; default: the machine's cores shared out evenly.
        stages_per_device: How many of the stages lie on each device, until the cutter changes it.
        defer_weight_gradients: Whether gradients of weights are computed when a device has nothing
            else to do, at the latest at the end of backward; ``"auto"``: of large operations.
        one_at_a_time: Whether a stage works only while no other does, as for measuring it.
    """

    def __init__(
        self,
        cutter: Cutter,
        splitter: Splitter,
        devices: Sequence[torch.device],
        *,
        chunks: Chunks,
        checkpoint: Checkpoint | Sequence[Checkpoint] = "never",
        deferred_batch_norm: bool = True,
        step_batch: Callable[[], StepBatch] = StepBatch,
        parity: Parity | None = None,
        on_cut: Callable[[Cut], None] = lambda _: None,
        threads: int | None = None,
        stages_per_device: int = 1,
        defer_weight_gradients: Defer = "auto",
        one_at_a_time: bool = False,
    ) -> None:
        self.cutter, self._own = cutter, list(devices)[: len(devices) // stages_per_device]
        self._splitter, count = splitter, len(self._own)
        self._turns = 1 if one_at_a_time else count  # of a device's stages, one works at a time
        self.chunks, self._checkpoint, self._deferred = chunks, checkpoint, deferred_batch_norm
        self._deferral = Deferral(defer_weight_gradients, devices)
        self._step_batch, self._on_cut, self._parity = step_batch, on_cut, parity
        self._check = parity or Parity("off", type(cutter.module).__name__, devices)
        self._threads = threads or max(1, available_cores() // count)
        self._workers = Workers(self._own, self._threads)
        self.streams = RandomStreams([] if one_at_a_time else self._own)
        self.streams.restart()
        self._cut: Cut | None = None
        expected = cutter.expected()
        self._units = None if expected is None else Units(expected.units, self.devices)
        self._swap: ParameterSwap | None = None
        self._ways: dict[Hashable, list[int]] = {}
        self._memories: dict[int, Memory] = {}
        self.recording: Recording | None = None
        """Records when stages work, of calls made while it is set and of their backward."""
        self.calls = 0
        """How often the module has been called."""
        splitter.check(cutter.forward)
        self._assigned = Assigned(self._modules())

    @property
    def stages_per_device(self) -> int:
        return self.cutter.stages // len(self._own)

    @property
    def devices(self) -> list[torch.device]:
        """The device of each stage."""
        return self._own * self.stages_per_device

    @property
    def checkpoint(self) -> Sequence[Checkpoint]:
        """Of each stage, which micro-batches are computed again in backward."""
        if self.cutter.chosen is not None:
            return self.cutter.chosen.best.checkpoint
        return per_stage(self._checkpoint, self.cutter.stages)

    def close(self) -> None:
        """Stop the threads."""
        self.streams.finish()
        self._workers.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's `forward` in micro-batches on all stages.

        Raises:
            PartitionError: The module cannot be cut as asked.
            SplitError: The arguments cannot be split, or the outputs not be joined.
            BaseException: The first error of any micro-batch, with a note that says where.
        """
        self.calls += 1
        try:
            batch = self._step_batch()
            is_piece = self._splitter.pieces(self.cutter.forward, (args, kwargs), batch)
            call = CallArguments.of(self.cutter.forward, args, kwargs, is_piece)
            return self._computed(call, self._split(call, batch))
        except SplitError as error:
            if not self._is_whole:
                add_note(error, _WAY_OUT)
            raise

    @property
    def _is_whole(self) -> bool:
        """Return whether the user wants a single micro-batch."""
        return self.chunks.usual == 1

    def _split(self, call: CallArguments, batch: StepBatch) -> Splitting:
        """Decide how a call is split; not at all for a single micro-batch or a stateful call."""
        not_at_all = Splitting(1, {})
        if call.stateful() and not torch.is_grad_enabled():
            return not_at_all
        try:
            splitting = self._splitter.split(call, self.cutter.forward, batch, self._fixed)
        except SplitError:
            if self._is_whole:
                return not_at_all
            raise
        return not_at_all if splitting.doubts and self._is_whole else splitting

    def _computed(self, call: CallArguments, splitting: Splitting) -> Any:
        cut = self._known_cut(call, splitting)
        size = splitting.size
        # Batch normalisation cannot be trained on a single sample.
        least = 2 if any(layer.training for layer in cut.normalised) else 1
        count = self.chunks.next(size) if torch.is_grad_enabled() else self.chunks.usual
        counts = mb.sizes(size, count, least)
        layouts = self._checked(call, cut, splitting, counts) if len(counts) > 1 else None
        with self.streams.step(
            self._kind(),
            len(counts),
            always=any(c != "never" for c in self.checkpoint) and torch.is_grad_enabled(),
        ) as streams:
            return self._run(call, cut, splitting, counts, streams, layouts)

    def _known_cut(self, call: CallArguments, splitting: Splitting) -> Cut:
        """The stages; found out by a trial at the first call."""
        cut = self.cutter.current()
        if cut is None:
            cut = self._observed(call, splitting)
        if cut is not self._cut:
            self._cut, self._swap, self._ways = cut, None, {}
            self._units = Units(cut.units, self.devices)
            self._on_cut(cut)
        return cut

    def _observed(self, call: CallArguments, splitting: Splitting) -> Cut:
        first = FirstCall(
            self.cutter,
            self._trial(call, splitting),
            splitting,
            self._workers,
            lambda: self._check.unseen(self._modules()),
        )
        cut = first.cut(self.chunks.usual, self.chunks.candidates)
        if self.cutter.chosen is not None:
            self.chunks.settle(self.cutter.chosen.best.chunks)
        return cut

    def _checked(
        self,
        call: CallArguments,
        cut: Cut,
        splitting: Splitting,
        counts: Sequence[int],
        anew: bool = False,
    ) -> Layouts | None:
        """Find the batch dimensions of the output, and compare a few samples."""
        if self._parity is None:
            return None
        modules, trial = self._modules(), self._trial(call, splitting)
        if not anew:
            is_used = partial(self._parity.uses, trial, modules)
            self._assigned.check(modules, splitting.size, self._step_batch(), is_used)
        return self._parity.layouts(call, trial, cut, splitting, counts, modules, anew)

    def _trial(self, call: CallArguments, splitting: Splitting) -> SampleRun:
        return SampleRun(self.cutter.forward, call, splitting, self.devices, self._units)

    def _modules(self) -> dict[str, nn.Module]:
        """All modules that stages run, by name; the split module first."""
        return named_once(self.cutter.roots)

    def _kind(self) -> str:
        module = self.cutter.module
        mode = "training" if module.training else "evaluation"
        return f"`{type(module).__name__}.forward` ({mode})"

    def _fixed(self) -> list[Tensor]:
        module = self.cutter.module
        return [*module.parameters(), *module.buffers()]

    def _run(
        self,
        call: CallArguments,
        cut: Cut,
        splitting: Splitting,
        counts: Sequence[int],
        streams: Sequence[Stream],
        layouts: Layouts | None,
    ) -> Any:
        assert self._units is not None
        given = MicrobatchArguments(call, splitting, counts)
        swap = self._swapped(cut)
        key = (self._kind(), call.kind, torch.is_grad_enabled())
        execution = Execution(
            self._units,
            self.devices,
            self._ways.get(key) or cut.way or (0,),
            [partial(given.compute, self.cutter.forward, chunk) for chunk in range(len(counts))],
            streams,
            self.checkpoint if torch.is_grad_enabled() else ["never"] * self.cutter.stages,
            self._memory_of,
            cut.writers,
            batch_norm.Recorder(cut.normalised, part_at_hand),
            self._deferred,
            swap,
            self.recording,
            [stage % self._turns for stage in range(self.cutter.stages)],
            self._deferral.least((key, *counts)),
        )
        with swap.entered() if swap else nullcontext():
            execution.forward(self._crew(execution.at_once))
        self._ways[key] = execution.way
        self._deferral.saw((key, *counts), execution.defers)
        if self._deferred:
            batch_norm.commit(cut.normalised, execution.statistics)
        given.count_writing()
        results, execution.results = execution.results, []

        def known(tensor: Tensor) -> Tensor | None:
            argument = given.argument(tensor)
            return swap.original(tensor) if argument is None and swap else argument

        latest = [traveller.stand_ins.latest for traveller in execution.travellers]
        given_out = results, known, counts, self.devices[0]
        try:
            output = Output(*given_out, layouts, latest, guess=False)
        except Undecided:
            layouts = self._checked(call, cut, splitting, counts, anew=True)
            output = Output(*given_out, layouts, latest, guess=True)
        execution.settle()
        replaced = output.replace(output.wanting())
        if torch.is_grad_enabled():
            assert swap is not None
            replaced = output.replace(self._grafted(given, execution, output, swap, sum(counts)))
        if self._parity is not None:
            self._assigned.update(self._modules())
        return replaced

    def _grafted(
        self,
        given: MicrobatchArguments,
        execution: Execution,
        output: Output,
        swap: ParameterSwap,
        size: int,
    ) -> Sequence[Tensor]:
        """The output's tensors as part of the caller's graph."""
        arguments = given.wanting()

        def backward(gradients: Gradients, keep: bool) -> Gradients:
            try:
                with swap.entered(refresh=False):
                    execution.backward(self._workers, output.split(gradients), keep)
            finally:
                if not keep:
                    output.forget()
                sums = swap.take_gradients()
                of_arguments = given.take_gradients()
            self.chunks.took(execution.count, execution.seconds, size)
            return [*of_arguments, *sums]

        return graft(output.wanting(), [*arguments, *swap.parameters], backward)

    def _crew(self, count: int) -> Workers:
        """Workers: a thread for each micro-batch in flight and for each device."""
        if len(self._workers.devices) < count:
            self._workers.close()
            self._workers = Workers([self.devices[0]] * count, self._threads)
        return self._workers

    def _memory_of(self, unit: nn.Module) -> Memory:
        return self._memories.setdefault(id(unit), Memory([unit]))

    def _swapped(self, cut: Cut) -> ParameterSwap | None:
        """Replacements for parameters; `None` where the parameters can be used themselves."""
        if self._swap is None or self._swap.is_stale():
            self._swap = ParameterSwap(self.cutter.roots, cut.stage_of, cut.owner, self.devices)
        needed = torch.is_grad_enabled() or self._swap.has_loans
        return self._swap if needed else None
