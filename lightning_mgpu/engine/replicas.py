"""Replicas of a module, one per device, kept in step with their master.

Slot 0 computes with the master itself, whose parameters give way to aliases for as long as a step
lasts; the other slots have structural copies. So every slot accumulates gradients of its own, and
the parameters that a user's optimizer, hooks and callbacks know get them once, as one sum.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.leaves import Leaves, add_gradients
from lightning_mgpu.engine.structure import Remap, Structure, merge_containers
from lightning_mgpu.engine.workers import Workers

log = logging.getLogger(__name__)

__all__: list[str] = []

_MISSING = object()
_HOOKS = frozenset(
    key for key, value in vars(nn.Module()).items() if "hooks" in key and isinstance(value, dict)
)
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"}) | _HOOKS
_COMPILED = frozenset({"forward", "dynamo_ctx"})
_COMPARABLE = (bool, int, float, complex, str, bytes, type(None))


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
        self._warned: set[tuple[type, str]] = set()
        self._slots: list[_Master | _Copy] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The master's parameters, in the order of gradients."""
        return self._structure.parameters

    @property
    def units(self) -> list[Any]:
        """The master's units."""
        return self._structure.units

    def units_of(self, slot: int) -> list[Any]:
        """A slot's copies of the units."""
        return self._slots[slot].units

    def leaves_of(self, slot: int) -> list[nn.Parameter]:
        """A slot's leaves, one per parameter."""
        return self._slots[slot].leaves.leaves

    @contextmanager
    def step(
        self, count: int, overrides: Sequence[Mapping[str, Any]] = ()
    ) -> Iterator[list[nn.Module]]:
        """A step of the first `count` slots.

        Args:
            count: The slots that take part.
            overrides: For each slot, attributes of its module for the length of the step.

        Yields:
            The slots' modules. When the step is over without an error, what they have put into
            lists and other containers, and batch normalisation's running statistics, are in the
            master.
        """
        self._refresh(count)
        slots = self._slots[:count]
        try:
            with ExitStack() as stack:
                for index, slot in enumerate(slots):
                    stack.enter_context(slot.entered(overrides[index] if overrides else {}))
                yield [slot.module for slot in slots]
        finally:
            statistics = [slot.recorder.take() for slot in slots]
        batch_norm.commit(self._layers, statistics[: 1 if self._statistics == "first" else count])
        for slot in slots[1:]:
            assert isinstance(slot, _Copy)
            merge_containers(slot.remap)
            slot.report_lost_writes(self._warned)

    @contextmanager
    def as_outside(self, count: int) -> Iterator[None]:
        """Within a step: the master as it is outside of steps.

        Afterwards the leaves follow the parameters again, and show their gradients: slot 0's own,
        so that clipping by hand reaches them, and copies to the others.
        """
        master = self._slots[0]
        assert isinstance(master, _Master)
        with master.left():
            yield
        for index, slot in enumerate(self._slots[:count]):
            slot.leaves.refresh()
            slot.leaves.show_gradients(copy=index > 0)

    @contextmanager
    def as_inside(self) -> Iterator[None]:
        """Within `as_outside`: the master as it is in the step, again."""
        master = self._slots[0]
        assert isinstance(master, _Master)
        with master.entered(master.overrides):
            yield

    @contextmanager
    def backward(self, count: int) -> Iterator[None]:
        """What a backward pass that runs parts of forward again needs to find."""
        for slot in self._slots[:count]:
            slot.leaves.take_gradients()  # left by a pass that failed, or shown in a step
        with ExitStack() as stack:
            for slot in self._slots[:count]:
                stack.enter_context(slot.entered({}))
            yield
        for slot in self._slots[:count]:
            slot.recorder.take()  # those parts have been counted already

    def take_gradients(self, workers: Workers, count: int) -> list[Tensor | None]:
        """The sum of the slots' gradients for each parameter; the slots forget theirs."""
        gradients = [slot.leaves.take_gradients() for slot in self._slots[:count]]
        if count == 1:
            return gradients[0]
        root = self.devices[0]
        # The sums are bound by memory: share them out where the workers have memory in common.
        parts = count if root.type == "cpu" else 1
        shares = _shares([parameter.numel() for parameter in self.parameters], parts)
        sums = workers.run([_adder(gradients, root, share) for share in shares])
        totals: list[Tensor | None] = [None] * len(self.parameters)
        for share, values in zip(shares, sums, strict=True):
            for index, value in zip(share, values, strict=True):
                totals[index] = value
        return totals

    def _refresh(self, count: int) -> None:
        # A first step may be a validation step, and what is made then must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            if not self._slots or self._is_stale():
                self._build()
            for slot in self._slots[:count]:
                slot.refresh()

    def _is_stale(self) -> bool:
        master = self._slots[0]
        assert isinstance(master, _Master)
        return master.is_stale()

    def _build(self) -> None:
        self._structure = Structure(
            self.master, self._is_unit, self._is_opaque, self._own_attributes
        )
        compiled = _inside_compiled(self._structure.modules)
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
            kind = _Copy if index else _Master
            self._slots.append(
                kind(
                    self._structure,
                    memo,
                    leaves,
                    copies,
                    self._layers,
                    device,
                    self._own_attributes,
                )
            )


class _Slot:
    """What the master's slot and the copies' have in common."""

    def __init__(
        self,
        structure: Structure,
        memo: dict[int, Any],
        leaves: Leaves,
        units: list[Any],
        layers: list[nn.Module],
        device: torch.device,
        own_attributes: frozenset[str],
    ) -> None:
        self.structure = structure
        self.leaves = leaves
        self.units = units
        self.device = device
        self.remap = Remap(memo)
        self.own_attributes = own_attributes
        self.module: nn.Module
        self.recorder = batch_norm.Recorder(layers)


class _Master(_Slot):
    """Slot 0: the user's own module, patched while a step lasts."""

    def __init__(self, structure: Structure, *args: Any) -> None:
        super().__init__(structure, *args)
        self.module = structure.modules[0]
        self._parts = [_parts(module) for module in structure.modules]
        self._patches = [
            (holder, key, value, new)
            for holder, key, value in structure.places
            # Containers are places' holders themselves, and modules stay.
            if not isinstance(value, (nn.Module, list, dict, deque)) or id(value) in self.remap.memo
            if (new := self.remap(value)) is not value
        ]
        self._patches += [
            (vars(module), "_compiled_call_impl", module._compiled_call_impl, None)
            for module in structure.modules
            if module._compiled_call_impl is not None
        ]
        self.overrides: Mapping[str, Any] = {}

    def is_stale(self) -> bool:
        """Whether modules or parameters are no longer those that were copied."""
        return any(
            not _same_parts(_parts(module), parts)
            for module, parts in zip(self.structure.modules, self._parts, strict=True)
        )

    def refresh(self) -> None:
        self.leaves.refresh()

    @contextmanager
    def entered(self, overrides: Mapping[str, Any]) -> Iterator[None]:
        self._enter(overrides)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def left(self) -> Iterator[None]:
        overrides = self.overrides
        self._leave()
        try:
            yield
        finally:
            self._enter(overrides)

    def _enter(self, overrides: Mapping[str, Any]) -> None:
        self.overrides = overrides
        for holder, key, _, new in self._patches:
            holder[key] = new
        vars(self.module).update(overrides)
        self.recorder.attach()

    def _leave(self) -> None:
        self.recorder.detach()
        for key in self.overrides:
            vars(self.module).pop(key, None)
        for holder, key, old, new in self._patches:
            if _at(holder, key) is new:  # else the step has put something there
                holder[key] = old


class _Copy(_Slot):
    """Another slot: a structural copy, brought up to date before each step."""

    def __init__(self, structure: Structure, memo: dict[int, Any], *args: Any) -> None:
        super().__init__(structure, memo, *args)
        for original in (*structure.modules, *structure.objects):
            memo[id(original)] = object.__new__(type(original))
        self._pairs = [(m, memo[id(m)]) for m in (*structure.modules, *structure.objects)]
        self._buffers = _Buffers(structure.modules, memo, self.device)
        for index, module in enumerate(structure.modules):
            _fill(module, memo[id(module)], self._buffers.holder(index), self.remap)
        self._update()
        for module in structure.modules:
            if _is_compiled(module):
                _compile_again(module, memo[id(module)], self.remap)
        self.module = memo[id(structure.modules[0])]
        self.recorder = batch_norm.Recorder([memo[id(x)] for x in self.recorder.layers])
        # Torch's own layers write no attributes in `forward`.
        self._watched = [
            (o, c) for o, c in self._pairs if not type(o).__module__.startswith("torch.")
        ]
        self._before: list[dict[str, Any]] = []

    def refresh(self) -> None:
        self.leaves.refresh()
        self._buffers.refresh()
        self._update()
        if hasattr(self.module, "_device"):
            vars(self.module)["_device"] = self.device
        self._before = [dict(vars(copied)) for _, copied in self._watched]

    @contextmanager
    def entered(self, overrides: Mapping[str, Any]) -> Iterator[None]:
        vars(self.module).update(overrides)
        self.recorder.attach()
        try:
            yield
        finally:
            self.recorder.detach()
            for key in overrides:
                vars(self.module).pop(key, None)

    def _update(self) -> None:
        self.remap.begin()
        for original, copied in self._pairs:
            skip = _PARTS | _COMPILED if _is_compiled(original) else _PARTS
            state = vars(original)
            _update_attributes(state, vars(copied), self.remap, skip, self.own_attributes)

    def report_lost_writes(self, warned: set[tuple[type, str]]) -> None:
        """Warn, once, of attributes that this slot's task has set to other values than slot 0's."""
        for (original, copied), before in zip(self._watched, self._before, strict=True):
            for key, value in vars(copied).items():
                if value is before.get(key, _MISSING) or key in self.own_attributes:
                    continue
                where = (type(original), key)
                if where in warned or key in _PARTS or _equal(value, vars(original).get(key)):
                    continue
                warned.add(where)
                log.warning(
                    "The step sets `%s.%s` to another value on each replica; replica 0's is kept."
                    " Log it with `self.log`, append it to a list or return it to have them all.",
                    type(original).__name__,
                    key,
                )


class _Buffers:
    """A copy's buffers, in memory of its own even on the master's device: steps write to them."""

    def __init__(
        self, modules: Sequence[nn.Module], memo: dict[int, Any], device: torch.device
    ) -> None:
        self._device = device
        self._known: dict[tuple[int, str], _Buffer] = {}
        # Later modules may share a buffer with an earlier one.
        copies: dict[int, _Buffer] = {}
        self._holders = []
        for module in modules:
            holder: dict[str, Tensor | None] = {}
            self._holders.append((module._buffers, holder))
            for name, buffer in module._buffers.items():
                holder[name] = None
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = _Buffer(buffer, device)
                    holder[name] = copies[id(buffer)].copied
                    self._known[id(holder), name] = copies[id(buffer)]
        memo |= {key: buffer.copied for key, buffer in copies.items()}
        self._copies = copies  # keeps the originals, and so their ids, alive

    def holder(self, index: int) -> dict[str, Tensor | None]:
        """The buffers of the copy of module `index`."""
        return self._holders[index][1]

    def refresh(self) -> None:
        """Copy what has been written to, on either side, and what has been set anew."""
        for originals, copies in self._holders:
            for name, original in originals.items():
                if original is None:
                    copies[name] = None
                    continue
                known = self._known.get((id(copies), name))
                if known is None or known.original is not original:
                    known = self._known[id(copies), name] = _Buffer(original, self._device)
                copies[name] = known.up_to_date()
            for name in copies.keys() - originals.keys():
                del copies[name]


class _Buffer:
    """One buffer and its copy."""

    def __init__(self, original: Tensor, device: torch.device) -> None:
        self.original = original
        self.copied = original.detach().to(device, copy=True)
        self._versions = self._now()

    def up_to_date(self) -> Tensor:
        """The copy, with the original's values."""
        if self._versions is None or self._versions != self._now():
            self.copied.copy_(self.original, non_blocking=True)
            self._versions = self._now()
        return self.copied

    def _now(self) -> tuple[int, int] | None:
        if self.original.is_inference():
            return None  # such a tensor does not count its versions
        return self.original._version, self.copied._version


def _fill(
    original: nn.Module, copied: nn.Module, buffers: dict[str, Tensor | None], remap: Remap
) -> None:
    """Give a blank copy its parts."""
    state = vars(copied)
    state["_parameters"] = _remapped(original._parameters, remap)
    state["_buffers"] = buffers
    state["_modules"] = _remapped(original._modules, remap)
    state["_compiled_call_impl"] = None
    state.update({key: type(vars(original)[key])() for key in _HOOKS})


def _compile_again(original: Any, copied: Any, remap: Remap) -> None:
    """A compiled module calls the one it was made of; have the copy call the copy of that."""
    made = type(original)(remap(original._orig_mod), original.dynamo_ctx)
    vars(copied).update({key: vars(made)[key] for key in _COMPILED})


def _update_attributes(
    original: dict[str, Any],
    copied: dict[str, Any],
    remap: Remap,
    skip: frozenset[str],
    shared: frozenset[str],
) -> None:
    """Bring a copy's attributes, hooks among them, up to date.

    Args:
        original: The attributes of the original.
        copied: Those of its copy.
        remap: From the one's parts to the other's.
        skip: Attributes that the copy has of its own.
        shared: Attributes to be taken over as they are.
    """
    for key, value in original.items():
        if copied.get(key, _MISSING) is value:
            continue
        if key in _HOOKS:
            if value or copied[key]:
                copied[key].clear()
                copied[key].update(_remapped(value, remap))
        elif key not in skip:
            copied[key] = value if key in shared else remap(value)
    if len(copied) > len(original):
        for key in copied.keys() - original.keys():
            del copied[key]


def _remapped(holder: Mapping[Any, Any], remap: Remap) -> dict[Any, Any]:
    return {key: remap(value) for key, value in holder.items()}


def _parts(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._modules.values()]


def _same_parts(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _inside_compiled(modules: Iterable[nn.Module]) -> set[int]:
    return {
        id(inner)
        for module in modules
        if _is_compiled(module)
        for inner in module._orig_mod.modules()  # type: ignore[union-attr]
    }


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` makes of a module."""
    # Costs a second to import, and nothing is compiled as long as nobody has.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _at(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError):
        return _MISSING


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _COMPARABLE) and a == b)


def _shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deal out indices so that the sums of sizes are about even, largest first."""
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
