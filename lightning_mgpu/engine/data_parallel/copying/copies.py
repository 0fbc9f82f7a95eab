"""The other replicas: structural copies, brought up to date before each step."""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu._compat.torch_modules import (
    BLANK,
    BUFFERS,
    BUFFERS_NOT_SAVED,
    CHILDREN,
    COMPILED_ATTRIBUTES,
    COMPILED_CALL,
    HOOKS,
    PARAMETERS,
    children_of,
    compile_again,
    inside_compiled,
    is_compiled,
    original_of,
    parameters_of,
)
from lightning_mgpu.engine import recurrent
from lightning_mgpu.engine.batch_norm import Recorder
from lightning_mgpu.engine.data_parallel.copying.generators import Generators
from lightning_mgpu.engine.data_parallel.copying.remap import Remap
from lightning_mgpu.engine.data_parallel.copying.replica import Replica
from lightning_mgpu.engine.data_parallel.copying.structure import Structure
from lightning_mgpu.engine.data_parallel.copying.tensors import BufferCopies, Tensors
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import Tracked, track

_MISSING = object()
_BLANK = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
# The names of buffers: all replicas register the same.
_SHARED = frozenset({BUFFERS_NOT_SAVED})
_PARTS = frozenset({PARAMETERS, BUFFERS, CHILDREN, COMPILED_CALL}) | HOOKS


class Copy(Replica):
    """A copy of the master on another slot.

    Attributes:
        tensors: Its copies of the master's tensors.
        buffers: Those that are buffers.
        watched: Pairs of an original and its copy whose attributes a step may write to.
        before: The attributes of the copies at the start of the step.
        was: Those of the originals.
        passed_over: Attributes that nothing is brought back from.
    """

    def __init__(self, structure: Structure, memo: dict[int, Any], *args: Any) -> None:
        super().__init__(structure, memo, *args)
        self.tensors = Tensors(self.root, self.device)
        generators = Generators(self.root, self.device, self.slot)
        self.remap = Remap(memo, self.tensors, generators, structure.is_opaque)
        for original in (*structure.modules, *structure.objects):
            kind: Any = type(original)
            memo[id(original)] = kind.__new__(kind)
        self._pairs = [(m, memo[id(m)]) for m in (*structure.modules, *structure.objects)]
        layers = self.recorder.layers
        self.buffers = BufferCopies(structure.modules, structure.names, layers, self.tensors)
        for index, module in enumerate(structure.modules):
            self._fill(module, memo[id(module)], index)
        self._layers = [_is_layer(original) for original, _ in self._pairs]
        self._layer_states: dict[int, list[Any]] = {}
        # A tracked number in compiled code would have it compiled again.
        compiled = inside_compiled(structure.modules)
        self._tracks = [
            not is_layer and id(original) not in compiled
            for is_layer, (original, _) in zip(self._layers, self._pairs, strict=True)
        ]
        self._update()
        for module in structure.modules:
            if is_compiled(module):
                compile_again(module, memo[id(module)], self.remap(original_of(module)))
        self.module = memo[id(structure.modules[0])]
        self.recorder = Recorder([memo[id(x)] for x in layers])
        self.watched = [(o, c) for o, c in self._pairs if _may_write(o)]
        self._class_numbers = [_class_numbers(type(original)) for original, _ in self.watched]
        self.passed_over = self.own_attributes | _PARTS | COMPILED_ATTRIBUTES
        self.before: list[dict[str, Any]] = []
        self.was: list[dict[str, Any]] = []

    @override
    def refresh(self) -> None:
        self.leaves.refresh()
        self.tensors.begin()
        self.buffers.refresh()
        self._update()
        if hasattr(self.module, "_device"):
            vars(self.module)["_device"] = self.device
        self.was = [dict(vars(original)) for original, _ in self.watched]
        for (original, copied), was, names in zip(
            self.watched, self.was, self._class_numbers, strict=True
        ):
            for name in names:
                if name not in was:
                    was[name] = getattr(type(original), name)
                    vars(copied)[name] = track(was[name], self.remap.sites)
        self.before = [dict(vars(copied)) for _, copied in self.watched]

    @override
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

    def _fill(self, original: nn.Module, copied: nn.Module, index: int) -> None:
        """Give a blank copy its parts."""
        state = vars(copied)
        state[PARAMETERS] = self._remapped(parameters_of(original))
        state[BUFFERS] = self.buffers.holder(index)
        state[CHILDREN] = self._remapped(children_of(original))
        state[COMPILED_CALL] = None
        state.update({key: type(vars(original)[key])() for key in HOOKS})

    def _update(self) -> None:
        """Bring the attributes of all copies, hooks among them, up to date."""
        self.remap.begin()
        for index, (original, copied) in enumerate(self._pairs):
            state = vars(original)
            if self._layers[index]:
                if self._is_as_before(index, state, vars(copied)):
                    continue
                has_tensors = any(isinstance(value, Tensor) for value in state.values())
                self._layer_states[index] = [] if has_tensors else list(state.values())
            skip = _PARTS | COMPILED_ATTRIBUTES if is_compiled(original) else _PARTS
            self.remap.where = type(original).__name__
            if self._tracks[index]:
                with self.remap.tracking():
                    self._update_attributes(state, vars(copied), skip)
            else:
                self._update_attributes(state, vars(copied), skip)
            if isinstance(copied, nn.RNNBase):
                for holder, key, _, new in recurrent.stand_ins(copied, lambda weight: weight):
                    holder[key] = new

    def _is_as_before(self, index: int, state: dict[str, Any], copied: dict[str, Any]) -> bool:
        """Return whether a torch layer has its attributes of before, and no hooks."""
        before = self._layer_states.get(index, ())
        return (
            len(before) == len(state)
            and all(map(operator.is_, state.values(), before))
            and not any(map(state.get, HOOKS))
            and not any(map(copied.get, HOOKS))
        )

    def _update_attributes(
        self, original: dict[str, Any], copied: dict[str, Any], skip: frozenset[str]
    ) -> None:
        for key, value in original.items():
            held = copied.get(key, _MISSING)
            if held is value:
                continue
            kind = type(value)
            if kind is int or kind is float:
                if isinstance(held, Tracked) and held.value is value and held.root is held:
                    continue
            elif key in HOOKS:
                if value or held:
                    copied[key].clear()
                    copied[key].update(self._remapped(value))
                continue
            if key not in skip:
                shared = key in self.own_attributes or key in _SHARED
                copied[key] = value if shared else self.remap.at(key, value)
        if len(copied) > len(original):
            for key in copied.keys() - original.keys():
                del copied[key]

    def _remapped(self, holder: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self.remap(value) for key, value in holder.items()}


def _is_layer(value: Any) -> bool:
    """Return whether `value` is a module of torch's own, without attributes added by the user."""
    if not type(value).__module__.startswith("torch."):
        return False
    return type(value) not in _BLANK or len(vars(value)) <= len(BLANK)


def _may_write(value: Any) -> bool:
    """Return whether a step may write attributes of `value`; on torch's layers only hooks do."""
    return not _is_layer(value) or any(vars(value).get(key) for key in HOOKS)


def _class_numbers(kind: type) -> list[str]:
    """Attributes of a user's class that its objects may begin to count with."""
    return [
        name
        for base in kind.__mro__
        if base.__module__.partition(".")[0] not in ("torch", "lightning", "builtins")
        for name, value in vars(base).items()
        if type(value) in (int, float) and not name.startswith("__")
    ]
