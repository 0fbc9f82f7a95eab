"""A module in stages: its `forward`, computed by all devices, micro-batch by micro-batch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.autograd import Gradients, graft
from lightning_mgpu.engine.pipelining import microbatch as mb
from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.assigned import Assigned
from lightning_mgpu.engine.pipelining.cutter import Cut, Cutter
from lightning_mgpu.engine.pipelining.joining import Layouts
from lightning_mgpu.engine.pipelining.output import Output
from lightning_mgpu.engine.pipelining.parity import Parity
from lightning_mgpu.engine.pipelining.partition import Name
from lightning_mgpu.engine.pipelining.passage import Passage
from lightning_mgpu.engine.pipelining.recording import Recording
from lightning_mgpu.engine.pipelining.shadow import Shadow
from lightning_mgpu.engine.pipelining.splitter import Splitter, Splitting
from lightning_mgpu.engine.pipelining.stage_work import Checkpoint
from lightning_mgpu.engine.pipelining.tuning import Chunks
from lightning_mgpu.engine.randomness import RandomStreams, Stream
from lightning_mgpu.engine.workers import Workers

__all__: list[str] = []


class Pipeline:
    """Stands for a module's `forward`, with the same results.

    Args:
        cutter: Cuts the module.
        splitter: Tells which arguments carry the batch.
        devices: One for each stage.
        chunks: How many micro-batches; a batch with fewer samples makes fewer.
        checkpoint: Which micro-batches keep only their inputs, and are computed again in backward:
            ``"never"``, ``"except_last"``, ``"always"``.
        deferred_batch_norm: Whether running statistics are updated once, with those of the whole
            batch, or with each micro-batch.
        step_batch: Tells the batch of the step that calls.
        parity: Compares the output for a few samples with that of the same in two micro-batches;
            default: no check of any kind.
        on_cut: Called after a call's module has been cut, before anything is computed.
        threads: Intra-op threads of each stage; default: the machine's cores shared out evenly.
        workers: What runs the stages' tasks; default: a thread for each device.
    """

    def __init__(
        self,
        cutter: Cutter,
        splitter: Splitter,
        devices: Sequence[torch.device],
        *,
        chunks: Chunks,
        checkpoint: Checkpoint = "never",
        deferred_batch_norm: bool = True,
        step_batch: Callable[[], Any] = tuple,
        parity: Parity | None = None,
        on_cut: Callable[[Cut], None] = lambda _: None,
        threads: int | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.cutter, self.devices = cutter, list(devices)
        self._splitter = splitter
        self.chunks, self._checkpoint, self._deferred = chunks, checkpoint, deferred_batch_norm
        self._step_batch, self._on_cut, self._parity = step_batch, on_cut, parity
        self._workers = workers or Workers(self.devices, threads)
        self._streams = RandomStreams()
        self._streams.restart()
        self._shadow: Shadow | None = None
        self.recording: Recording | None = None
        """Takes down when stages work, of calls made while it is set and of their backward."""
        self.calls = 0
        """How often the module has been called."""
        splitter.check(cutter.forward)
        self._assigned = Assigned(self._modules())

    def close(self) -> None:
        """End the threads."""
        self._streams.finish()
        self._workers.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's `forward` returns.

        Raises:
            PartitionError: The module cannot be cut as asked.
            UntraceableError: Its `forward` cannot be recorded.
            SplitError: The arguments cannot be split, or the outputs not be joined.
            BaseException: The first error of any stage, with a note that says which.
        """
        self.calls += 1
        call = Call.of(self.cutter.forward, args, kwargs)
        splitting = self._splitter.split(call, self.cutter.forward, self._step_batch(), self._fixed)
        size = splitting.size
        if self.cutter.wants_costs:
            self._measure(call, splitting)
        cut = self.cutter(call)
        self._on_cut(cut)
        # Batch normalisation cannot be trained on a single sample.
        least = 2 if any(layer.training for found in cut.layers for layer in found) else 1
        count = self.chunks.next(size) if torch.is_grad_enabled() else self.chunks.usual
        counts = mb.sizes(size, count, least)
        layouts = self._checked(call, cut, splitting) if len(counts) > 1 else None
        with self._streams.step(
            self._kind(),
            len(self.devices) * len(counts),
            always=self._checkpoint != "never" and torch.is_grad_enabled(),
        ) as streams:
            return self._run(call, cut, splitting.dims, counts, streams, layouts)

    def _checked(self, call: Call, cut: Cut, splitting: Splitting) -> Layouts | None:
        """Where the batch lies in the output; refuses what is not the whole batch's."""
        if self._parity is None:
            return None
        modules = self._modules()
        is_used = partial(self._parity.uses, call, cut, splitting, modules)
        self._assigned.check(modules, splitting.size, self._step_batch(), is_used)
        return self._parity.layouts(call, cut, splitting, modules)

    def _modules(self) -> dict[str, nn.Module]:
        """All modules that stages run, by name, each once; the split module first."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for root in self.cutter.roots:
            for name, module in root.named_modules():
                found.setdefault(id(module), (name, module))
        unique: dict[str, nn.Module] = {}
        for name, module in found.values():
            unique[name if name not in unique else f"{name} #{len(unique)}"] = module
        return unique

    def _measure(self, call: Call, splitting: Splitting) -> None:
        count = self.chunks.usual
        parts = mb.sizes(splitting.size, count, 2)
        chunk = mb.cut(call.tensors, splitting.dims, parts)[0]
        # On a worker, which has as many intra-op threads as each stage will have.
        self._workers.run([lambda: self.cutter.measure(call, chunk, count)])

    def _kind(self) -> str:
        module = self.cutter.module
        mode = "training" if module.training else "evaluation"
        return f"`{type(module).__name__}.forward` ({mode})"

    def _fixed(self) -> list[Tensor]:
        module = self.cutter.module
        return [*module.parameters(), *module.buffers()]

    def _run(
        self,
        call: Call,
        cut: Cut,
        dims: Mapping[Name, int],
        counts: Sequence[int],
        streams: Sequence[Stream],
        layouts: Layouts | None,
    ) -> Any:
        chunks = mb.cut(call.tensors, dims, counts)
        passage = Passage(
            cut.partition,
            self.devices,
            chunks,
            [streams[i :: len(self.devices)] for i in range(len(self.devices))],
            self._checkpoint,
            [batch_norm.Recorder(found) for found in cut.layers],
            self._deferred,
            [any(t.requires_grad for t in tensors.values()) for tensors in cut.tensors],
            self._protected(call, cut, dims),
            cut.memories,
            self.recording,
        )
        shadow = self._shadowed() if torch.is_grad_enabled() else None
        inside: AbstractContextManager[None] = shadow.entered() if shadow else nullcontext()
        with inside:
            passage.forward(self._workers)
        if self._deferred:
            for found, parts in zip(cut.layers, passage.statistics, strict=True):
                batch_norm.commit(found, parts)
        for name in dims:
            if torch.is_grad_enabled() and any(mb.was_written(chunk[name]) for chunk in chunks):
                torch.autograd.graph.increment_version(call.tensors[name])
        output = Output(
            *(cut.partition, passage.results, call.tensors, frozenset(dims), counts),
            *(self.devices[0], layouts),
        )
        if shadow is not None:
            self._graft(call, dims, counts, passage, output, shadow)
        if self._parity is not None:
            self._assigned.update(self._modules())
        return output.filled()

    def _protected(self, call: Call, cut: Cut, dims: Mapping[Name, int]) -> frozenset[Name]:
        """The arguments that stages must not write to.

        Those that go to every micro-batch; those that the caller may take a gradient of; and those
        that lie on another device, where what is written to is a copy.
        """

        def is_elsewhere(name: Name, tensor: Tensor) -> bool:
            consumers = cut.partition.consumers.get(name, ())
            return any(self.devices[stage] != tensor.device for stage in consumers)

        return frozenset(
            name
            for name, tensor in call.tensors.items()
            if name not in dims
            or (torch.is_grad_enabled() and tensor.requires_grad)
            or is_elsewhere(name, tensor)
        )

    def _graft(
        self,
        call: Call,
        dims: Mapping[Name, int],
        counts: Sequence[int],
        passage: Passage,
        output: Output,
        shadow: Shadow,
    ) -> None:
        """Make the output part of the caller's graph."""
        arguments = {name: t for name, t in call.tensors.items() if t.requires_grad}
        parts = output.parts
        shares = {name: (counts, dims[name]) if name in dims else None for name in arguments}

        def backward(gradients: Gradients, keep: bool) -> Gradients:
            try:
                with shadow.entered():
                    taken = passage.backward(self._workers, parts.split(gradients), keep)
            finally:
                sums = shadow.take_gradients()
            self.chunks.took(passage.count, passage.seconds, sum(counts))
            found = (_argument_gradient(n, t, taken, shares[n]) for n, t in arguments.items())
            return [*found, *sums]

        inputs = [*arguments.values(), *shadow.parameters]
        output.replace(graft(output.wanting(), inputs, backward))

    def _shadowed(self) -> Shadow:
        if self._shadow is None or self._shadow.is_stale():
            self._shadow = Shadow(self.cutter.roots)
        return self._shadow


def _argument_gradient(
    name: Name,
    argument: Tensor,
    taken: Sequence[Mapping[tuple[Name, int], list[Tensor | None]]],
    share: tuple[Sequence[int], int] | None,
) -> Tensor | None:
    """The gradient of an argument from those of the micro-batches and stages that used it.

    Args:
        name: The argument's.
        argument: The argument.
        taken: For each micro-batch.
        share: Samples in each, and the batch's dimension, if it was split.
    """
    found: list[Tensor | None] = []
    for chunk in taken:
        of_stages = [g for (n, _), (g,) in sorted(chunk.items()) if n == name and g is not None]
        found.append(_sum([gradient.to(argument.device) for gradient in of_stages]))
    if share is None or all(gradient is None for gradient in found):
        return _sum([gradient for gradient in found if gradient is not None])
    counts, dim = share
    pieces = torch.split(argument.detach(), list(counts), dim)
    pairs = zip(found, pieces, strict=True)
    return torch.cat([torch.zeros_like(piece) if g is None else g for g, piece in pairs], dim)


def _sum(gradients: Sequence[Tensor]) -> Tensor | None:
    return reduce(torch.add, gradients) if gradients else None
