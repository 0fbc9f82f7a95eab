"""Replicas of a module, one per device, synchronised with their master.

Slot 0 computes with the master itself, whose parameters give way to aliases for as long as a step
lasts; the other slots have structural copies. So every slot accumulates gradients of its own, and
the parameters that a user's optimizer, hooks and callbacks know get them once, as one sum.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import inside_compiled
from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.data_parallel.copying.copies import Copy
from lightning_mgpu.engine.data_parallel.copying.master import Master
from lightning_mgpu.engine.data_parallel.copying.sandbox import Sandbox
from lightning_mgpu.engine.data_parallel.copying.structure import Structure
from lightning_mgpu.engine.data_parallel.side_effects.additions import AdditionWatch, WatchMode
from lightning_mgpu.engine.data_parallel.side_effects.effects import Effects
from lightning_mgpu.engine.data_parallel.side_effects.merge_rules import Judge
from lightning_mgpu.engine.data_parallel.side_effects.outside_variables import SharedVariables
from lightning_mgpu.engine.data_parallel.side_effects.parameter_writes import WriteCheck
from lightning_mgpu.engine.device import is_accelerator
from lightning_mgpu.engine.parameter_leaves import Leaves, add_gradients
from lightning_mgpu.engine.workers import Workers

# Elements from which on several threads add faster than one, waking them included.
_WORTH_SHARING = 2**18


class Replicas:
    """The master and its copies.

    Args:
        master: The user's module.
        devices: The device of each slot; the master lies on the first.
        statistics: Batch normalisation's running statistics: ``"merge"``, those of the whole batch,
            or ``"first"``, those of slot 0's shard.
        is_unit: Which objects each slot, the first included, has a copy of its own of that nothing
            is copied back from.
        copy_unit: Makes such a copy.
        is_opaque: Which objects are shared by all slots.
        own_attributes: Attributes of the master that a framework keeps for itself: they are not
            searched for parts, and writes to them are not warned about.
        own_memory: As in `Leaves`.
    """

    def __init__(
        self,
        master: nn.Module,
        devices: Sequence[torch.device],
        *,
        statistics: batch_norm.Statistics = "merge",
        is_unit: Callable[[Any], bool] = lambda _: False,
        copy_unit: Callable[[Any], Any] = lambda unit: unit,
        is_opaque: Callable[[Any], bool] = lambda _: False,
        own_attributes: Iterable[str] = (),
        own_memory: bool | None = None,
    ) -> None:
        self.master = master
        self.devices = list(devices)
        self._statistics = statistics
        self._is_unit, self._copy_unit, self._is_opaque = is_unit, copy_unit, is_opaque
        self._own_attributes = frozenset(own_attributes)
        self._own_memory = own_memory
        self._judge, self._watch = Judge(), AdditionWatch()
        self._mode: WatchMode | None = None
        self._slots: list[Master | Copy] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The master's parameters, in the order of gradients."""
        return self._structure.parameters

    @property
    def units(self) -> list[Any]:
        """The master's units."""
        return self._structure.units

    @property
    def copies(self) -> list[nn.Module]:
        """The other slots' modules, as far as they are made."""
        return [slot.module for slot in self._slots[1:]]

    def units_of(self, slot: int) -> list[Any]:
        """A slot's copies of the units."""
        return self._slots[slot].units

    def leaves_of(self, slot: int) -> list[nn.Parameter]:
        """A slot's leaves, one per parameter."""
        return self._slots[slot].leaves.leaves

    @contextmanager
    def step(
        self,
        count: int,
        overrides: Sequence[Mapping[str, Any]] = (),
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
        kind: str = "",
    ) -> Iterator[list[nn.Module]]:
        """A step of the first `count` slots.

        Args:
            count: The slots that take part.
            overrides: For each slot, attributes of its module for the length of the step.
            sizes: The samples that each slot has.
            weights: What they weigh in means; default: their number.
            kind: Which step of the module's.

        Yields:
            The slots' modules. When the step is over without an error, what they have put into
            lists and other containers and added to numbers, and batch normalisation's running
            statistics, are in the master.
        """
        self._refresh(count)
        slots = self._slots[:count]
        self._judge.begin(sizes, weights or sizes)
        self._mode = self._watch.begin(kind) if count > 1 else None
        self._writes.begin(kind)
        if count > 1:
            self._variables.begin(kind)
        try:
            with ExitStack() as stack:
                for index, slot in enumerate(slots):
                    stack.enter_context(slot.entered(overrides[index] if overrides else {}))
                yield [slot.module for slot in slots]
        finally:
            statistics = [slot.recorder.take() for slot in slots]
        self._writes.check()
        self._merge([slot for slot in slots if isinstance(slot, Copy)])
        batch_norm.commit(self._layers, statistics[: 1 if self._statistics == "first" else count])

    def _merge(self, copies: Sequence[Copy]) -> None:
        """Merge a step's side effects on the copies into the master."""
        if not copies:
            return
        if self._mode is not None:
            self._watch.learn(self._mode, copies[0].tensors)
        Effects(copies, self._judge, self._watch).merge()
        for name in self._variables.written():
            self._judge.outside(name)

    def watching(self, slot: int) -> AbstractContextManager[Any]:
        """Context for a slot's task in a step: record operations on the tensors that it keeps."""
        return self._mode if slot == 1 and self._mode is not None else nullcontext()

    def refer_to(self, references: Callable[[], Sequence[Sequence[float]]]) -> None:
        """Set means over each slot's samples, by which kept values are recognised in a step.

        Args:
            references: For each slot the loss and other such means, in the same order.
        """
        self._judge.references = references

    def finish(self) -> None:
        """Warn about what could not be decided until the end of the run."""
        self._judge.finish()

    @contextmanager
    def as_outside(self, count: int) -> Iterator[None]:
        """Context within a step in which the master is as it is outside of steps.

        Afterwards the leaves follow the parameters again, and show their gradients: slot 0's own,
        so that clipping by hand reaches them, and copies to the others.
        """
        master = self._slots[0]
        assert isinstance(master, Master)
        self._writes.check()
        for slot in self._slots[:count]:
            slot.leaves.check_gradients()
        with master.left():
            yield
        self._show(count)
        self._writes.note()

    @contextmanager
    def as_inside(self, count: int) -> Iterator[None]:
        """Context within `as_outside` in which the master is as it is in the step."""
        master = self._slots[0]
        assert isinstance(master, Master)
        # An optimizer may have moved the weights since.
        self._show(count)
        self._writes.note()
        with master.entered(master.overrides):
            yield
        self._writes.check()

    def _show(self, count: int) -> None:
        for index, slot in enumerate(self._slots[:count]):
            slot.leaves.refresh()
            slot.leaves.show_gradients(copy=index > 0)

    @contextmanager
    def backward(self, count: int) -> Iterator[None]:
        """Install the leaves for a backward pass that recomputes parts of forward."""
        for slot in self._slots[:count]:
            slot.leaves.take_gradients()  # left by a pass that failed, or shown in a step
        try:
            with ExitStack() as stack:
                for slot in self._slots[:count]:
                    stack.enter_context(slot.entered({}))
                yield
        finally:
            for slot in self._slots[:count]:
                slot.recorder.take()  # those parts have been counted already

    def take_gradients(self, workers: Workers, count: int) -> list[Tensor | None]:
        """The sum of the slots' gradients for each parameter; the slots forget theirs."""
        gradients = [slot.leaves.take_gradients() for slot in self._slots[:count]]
        if count == 1:
            return gradients[0]
        root = self.devices[0]
        sizes = [parameter.numel() for parameter in self.parameters]
        if is_accelerator(root) or sum(sizes) < _WORTH_SHARING:
            return add_gradients(gradients, root, range(len(sizes)))
        # The sums are bound by memory: share them out.
        shares = _shares(sizes, count)
        sums = workers.run([_adder(gradients, root, share) for share in shares])
        totals: list[Tensor | None] = [None] * len(self.parameters)
        for share, values in zip(shares, sums, strict=True):
            for index, value in zip(share, values, strict=True):
                totals[index] = value
        return totals

    def rebuild(self) -> None:
        """Inspect the master anew before the next step."""
        self._slots = []

    def sandboxes(self) -> Callable[[], Sandbox]:
        """A function that makes copies of the master as it is now, on its device, for trial runs.

        They are no slots, and nothing comes back from them.
        """
        structure = Structure(self.master, self._is_unit, self._is_opaque, self._own_attributes)

        def make() -> Sandbox:
            # A first step may be a validation step.
            with torch.inference_mode(False), torch.no_grad():
                device = self.devices[0]
                leaves = Leaves(structure.parameters, device, own_memory=True)
                units = [self._copy_unit(unit) for unit in structure.units]
                memo = dict(zip(map(id, structure.parameters), leaves.leaves, strict=True))
                memo |= dict(zip(map(id, structure.units), units, strict=True))
                sandbox = Sandbox(
                    structure, memo, leaves, units, [], [device], 0, self._own_attributes
                )
                sandbox.isolate(self._is_opaque)
                return sandbox

        return make

    def _refresh(self, count: int) -> None:
        # A first step may be a validation step, and what is made then must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            if not self._slots or self._is_stale():
                self._build()
            for slot in self._slots[:count]:
                slot.refresh()

    def _is_stale(self) -> bool:
        master = self._slots[0]
        assert isinstance(master, Master)
        return master.is_stale()

    def _build(self) -> None:
        self._structure = Structure(
            self.master, self._is_unit, self._is_opaque, self._own_attributes
        )
        compiled = inside_compiled(self._structure.modules)
        self._layers = [
            layer
            for layer in batch_norm.layers_of(self._structure.modules)
            if id(layer) not in compiled  # hooks do not reach into compiled code
        ]
        parameters, units = self._structure.parameters, self._structure.units
        self._slots = []
        for index, device in enumerate(self.devices):
            own_memory = self._own_memory if index else False
            leaves = Leaves(parameters, device, own_memory)
            memo = dict(zip(map(id, parameters), leaves.leaves, strict=True))
            copies = [self._copy_unit(unit) for unit in units]
            memo |= dict(zip(map(id, units), copies, strict=True))
            kind = Copy if index else Master
            self._slots.append(
                kind(
                    self._structure,
                    memo,
                    leaves,
                    copies,
                    self._layers,
                    self.devices,
                    index,
                    self._own_attributes,
                )
            )
        names = self._structure.parameter_names()
        self._variables = SharedVariables(self._structure)
        self._writes = WriteCheck(names, parameters, [slot.leaves for slot in self._slots])


def _shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Distribute indices so that the sums of sizes are about even, largest first."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += sizes[index]
    return shares


def _adder(
    gradients: Sequence[Sequence[Tensor | None]], root: torch.device, share: Sequence[int]
) -> Callable[[], list[Tensor | None]]:
    return lambda: add_gradients(gradients, root, share)
