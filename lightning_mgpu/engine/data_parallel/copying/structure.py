"""Objects reachable from a module, found for structural copies of it.

Unlike a deep copy, a structural copy has modules and containers of its own, while all else (data,
loggers, functions) stays shared, needs no pickling, and parameters may alias the original's.

Two slots on the CPU within a step, where leaves stand for the parameters on the master, too::

    master (slot 0)                                           copy (slot 1)
    LitModel                                                  LitModel
     |- net: Linear                                            |- net: Linear
     |   `- weight: Leaf -------> memory of the <--------------|---`- weight: Leaf
     |                            user's Parameter             |
     |- net.running: buffer                                    |- net.running: a copy
     |- accuracy: a copy of the metric                         |- accuracy: another
     |- seen: [...]                                            |- seen: [...], a copy for one step
     |- count: 3                                               |- count: 3, which knows additions
     |- rng: Generator                                         |- rng: one of its own
     |- head = net.forward                                     |- head = net.forward, of its net
     `- trainer, data --------->  one object   <---------------`- trainer, data

Modules and objects that lead to them are made blank, once, and get their attributes before each
step (`copies`), by a translation of references from one column to the other (`remap`). What a step
has left in the right column is brought to the left one by `side_effects`.
"""

import functools
import numbers
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import parameters_of

# Longer containers are shared rather than copied at every step.
MAX_CONTAINER = 10_000

ATOMS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, type(None), type, np.ndarray, np.generic),
    *(types.BuiltinFunctionType, types.ModuleType, numbers.Number),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, *weakref.ProxyTypes, weakref.ref),
)
_OPAQUE = (torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.DataLoader)
_LIBRARIES = ("torch", "lightning", "torchmetrics", "numpy", "builtins", "functools", "collections")


def closed_over(function: types.FunctionType) -> list[Any]:
    """The values of a function's closure."""
    return [_content(cell) for cell in function.__closure__ or ()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet, or deleted
        return None


class Structure:
    """The parts of a module that a copy needs for itself, and where they are referred to.

    Args:
        root: The module.
        is_unit: Which objects are to be replaced as a whole (metrics, say), their parts unseen.
        is_opaque: Which objects are to be shared, however much they refer to.
        ignore: Attributes of modules to pass over.

    Attributes:
        modules: All modules, `root` first.
        objects: Other objects of a user's classes that refer to modules or parameters.
        parameters: All parameters, each once.
        units: All units, each once.
        names: The name of each module in the root; its class, where it is no child of it.
        places: Every ``holder[key]`` that is or directly contains one of the above; holders are
            dicts (also those of attributes) and lists.
    """

    def __init__(
        self,
        root: nn.Module,
        is_unit: Callable[[Any], bool] = lambda _: False,
        is_opaque: Callable[[Any], bool] = lambda _: False,
        ignore: Iterable[str] = (),
    ) -> None:
        self.modules: list[nn.Module] = []
        self.objects: list[Any] = []
        self.parameters: list[nn.Parameter] = []
        self.units: list[Any] = []
        self.places: list[tuple[Any, Any, Any]] = []
        self._is_unit = is_unit
        self._is_opaque = is_opaque
        self._ignore = frozenset(ignore)
        self._linked: dict[int, bool] = {}
        self._keep: list[Any] = []  # an id means something only as long as its object lives
        self._visit(root)
        known = {id(module): name for name, module in root.named_modules()}
        self.names = [known.get(id(m), type(m).__name__) for m in self.modules]

    def is_opaque(self, value: Any) -> bool:
        """Return whether all replicas share an object, whatever it refers to."""
        return isinstance(value, _OPAQUE) or self._is_opaque(value)

    def parameter_names(self) -> list[str]:
        """The name of each parameter, by the module that has it or the place where it was found."""
        found: dict[int, str] = {}
        for module, name in zip(self.modules, self.names, strict=True):
            for key, parameter in parameters_of(module).items():
                found.setdefault(id(parameter), f"{name}.{key}" if name else key)
        for _, key, value in self.places:
            found.setdefault(id(value), str(key))
        return [found.get(id(p), "a parameter that no module has") for p in self.parameters]

    def _visit(self, value: Any) -> bool:
        """Return whether `value` is, or leads to, one of our parts."""
        if type(value) in ATOMS or isinstance(value, ATOMS):
            return False
        if id(value) in self._linked:
            return self._linked[id(value)]
        self._keep.append(value)
        self._linked[id(value)] = isinstance(value, nn.Module)  # for those who refer to themselves
        self._linked[id(value)] = linked = self._visit_new(value)
        return linked

    def _visit_new(self, value: Any) -> bool:
        if isinstance(value, nn.Parameter):
            self.parameters.append(value)
            return True
        if isinstance(value, Tensor) or self.is_opaque(value):
            return False
        if self._is_unit(value):
            self.units.append(value)
            return True
        if isinstance(value, nn.Module):
            self.modules.append(value)
            self._visit_entries(vars(value), self._ignore)
            return True
        if isinstance(value, (dict, list, deque)):
            return len(value) <= MAX_CONTAINER and self._visit_entries(value)
        if isinstance(value, (tuple, set, frozenset)):
            return len(value) <= MAX_CONTAINER and any([self._visit(part) for part in value])
        if isinstance(value, types.MethodType):
            return self._visit(value.__self__)
        if isinstance(value, types.FunctionType):
            return any([self._visit(part) for part in closed_over(value)])
        if isinstance(value, functools.partial):
            return any([self._visit(p) for p in (value.func, *value.args, value.keywords)])
        return self._visit_object(value)

    def _visit_object(self, value: Any) -> bool:
        library = type(value).__module__.partition(".")[0] in _LIBRARIES
        if library or not hasattr(value, "__dict__") or not self._visit_entries(vars(value)):
            return False
        self.objects.append(value)
        return True

    def _visit_entries(self, holder: Any, ignore: frozenset[str] = frozenset()) -> bool:
        linked = False
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in list(items):
            if (not ignore or key not in ignore) and self._visit(value):
                self.places.append((holder, key, value))
                linked = True
        return linked
