"""Find out where a step's first NaN or Inf comes from.

Not every Inf is a mistake: attention masks are full of them. So operations are not stopped at the
first one; each tensor that is not finite keeps the operation that its Inf or NaN came from::

    log(0)        -> -Inf, of `log`         mask -> -Inf, of `masked_fill`
    -Inf * 2      -> -Inf, of `log`         softmax(mask) -> finite, and forgotten
    -Inf - -Inf   -> NaN of `sub`, whose Inf came of `log`

and what counts is what the loss, or a gradient, has in the end.
"""

import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from typing_extensions import override

from lightning_mgpu._compat.python import frame_above
from lightning_mgpu._compat.torch import node_at_hand, schema_of, tree_leaves
from lightning_mgpu.engine.dispatch import CarriedMode, innermost
from lightning_mgpu.engine.error_notes import Place, places

_UNWRITTEN = ("empty", "new_empty", "resize_")  # what is there when nothing has been written yet
_OURS = Path(__file__).parent.parent
_NOT_THE_USERS = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")


@dataclass(frozen=True)
class Origin:
    """An operation, or a tensor that was there before, that a NaN or Inf comes from.

    Attributes:
        order: The number of the operation.
        value: ``"NaN"`` or ``"Inf"``.
        name: Of the operation, of the autograd node that it belongs to, or of the tensor.
        is_given: Whether it is a tensor.
        backward: Whether it happened in backward.
        module: The submodule that called it, or in backward the one that its forward belongs to.
        line: Where in the user's code, as ``file.py:12``.
        where: Replica, or stage and micro-batch.
    """

    order: int
    value: str
    name: str
    is_given: bool = False
    backward: bool = False
    module: str | None = None
    line: str | None = None
    where: str | None = None

    def __str__(self) -> str:
        if self.is_given:
            return f"{self.value} is in {self.name} already"
        module = "outside of submodules" if self.module is None else f"in `{self.module}`"
        if self.backward:
            words = f"{self.value} by `{self.name}`, in backward, {module}"
        else:
            words = f"{self.value} by `{self.name}` {module}, in forward"
        words += f" ({self.line})" if self.line else ""
        return words + (f", {self.where}" if self.where else "")


@dataclass(frozen=True)
class Trace:
    """Where a tensor's values come from that are not finite.

    Attributes:
        first: What made the first of them.
        nan: What made NaN of that, if it was not NaN from the beginning.
    """

    first: Origin
    nan: Origin | None = None

    @property
    def has_nan(self) -> bool:
        """Return whether NaN came of it."""
        return self.nan is not None or self.first.value == "NaN"

    def __str__(self) -> str:
        then = "" if self.nan is None else f"; of it became {self.nan}"
        return f"{self.first}{then}"


class FiniteWatch(CarriedMode):
    """Mode that follows values which are not finite through a step, on all of its threads.

    Args:
        names: Of modules, by their id.
        given: Tensors that are there before the step, by what to call them.
    """

    def __init__(self, names: Mapping[int, str], given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._shared = _Shared(names, given)
        self._stack: list[str] = []
        self._places = places()

    @override
    def for_thread(self) -> "FiniteWatch":
        other = FiniteWatch({}, {})
        other._shared, other._stack = self._shared, list(self._stack)
        return other

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the operations of the block and of the threads that work for it."""
        hooks = [
            register_module_forward_pre_hook(_before),
            register_module_forward_hook(_after, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin_backward(self, loss: Tensor) -> None:
        """Tell that what follows is the backward pass of a loss."""
        self._shared.claim(loss, None)
        self._shared.backward = True

    def trace(self, tensor: Tensor) -> Trace | None:
        """Where a tensor's NaN or Inf come from; `None` if that is not known."""
        return self._shared.traces.get(_memory_of(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = schema_of(func)
        name = schema.name.rpartition("::")[2]
        if not name.startswith(_UNWRITTEN):
            written = args if schema.is_mutable and result is None else ()  # `_foreach_add_`
            for tensor in _looked_at((result, written)):
                value = not_finite(tensor)
                if value is not None:
                    self._note(tensor, value, name, (args, kwargs))
        return result

    def _note(self, tensor: Tensor, value: str, name: str, arguments: Any) -> None:
        shared = self._shared
        known = shared.traces.get(_memory_of(tensor))
        if known is not None and (value == "Inf" or known.has_nan):
            return  # a view of what is known, or written to again
        inputs = map(shared.trace_of_input, _looked_at(arguments))
        found = [trace for trace in (known, *inputs) if trace is not None]
        own = self._origin(value, name)
        if not found:
            shared.keep(tensor, Trace(own))
            return
        first = min((trace.first for trace in found), key=lambda origin: origin.order)
        nans = [trace.nan for trace in found if trace.nan is not None]
        nan = min(nans, key=lambda origin: origin.order) if nans else None
        if value == "NaN" and not any(trace.has_nan for trace in found):
            nan = own
        shared.keep(tensor, Trace(first, nan))

    def _origin(self, value: str, name: str) -> Origin:
        shared = self._shared
        node = node_at_hand()  # (a step may differentiate itself, as for a gradient penalty)
        backward = shared.backward or node is not None
        module = self._stack[-1] if self._stack else None
        if node is not None:
            name, module = node.name(), shared.owner(node)
        place = self._places[-1] if self._places else None
        return Origin(
            next(shared.numbers),
            value,
            name,
            backward=backward,
            module=module,
            line=None if backward else _line(),
            where=None if place is None else _told(place, module),
        )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._shared.claim(args, self._stack[-1] if self._stack else None)
        name = self._shared.names.get(id(module))
        if name is None:
            name = self._stack[-1] if self._stack else type(module).__name__
        self._stack.append(name)

    def _leave_module(self, output: Any) -> None:
        if self._stack:
            self._shared.claim(output, self._stack.pop())


class _Shared:
    """What the modes of all threads know.

    Attributes:
        traces: Of tensors that are not finite, by their memory, which is kept from being reused.
    """

    def __init__(self, names: Mapping[int, str], given: Mapping[str, Tensor]) -> None:
        self.names, self.backward = names, False
        self.numbers = itertools.count(len(given))
        self.traces: dict[Any, Trace] = {}
        self._kept: list[Any] = []
        for order, (name, tensor) in enumerate(given.items()):
            if (value := not_finite(tensor)) is not None:
                self.keep(tensor, Trace(Origin(order, value, name, is_given=True)))
        self._owners: dict[int, tuple[Any, str | None]] = {}
        self._lock = threading.Lock()

    def keep(self, tensor: Tensor, trace: Trace) -> None:
        self._kept.append(tensor.untyped_storage())
        self.traces[_memory_of(tensor)] = trace

    def trace_of_input(self, tensor: Tensor) -> Trace | None:
        """Where an operation's argument has its NaN or Inf from; `None` if it has none."""
        return None if not_finite(tensor) is None else self.traces.get(_memory_of(tensor))

    def claim(self, value: Any, module: str | None) -> None:
        """Take note of which module has made the nodes behind tensors that nobody has claimed."""
        leaves = tree_leaves(value)
        nodes = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor)]
        with self._lock:
            while nodes:
                node = nodes.pop()
                if node is None or id(node) in self._owners:
                    continue
                self._owners[id(node)] = node, module
                nodes += [function for function, _ in node.next_functions]

    def owner(self, node: Any) -> str | None:
        return self._owners.get(id(node), (None, None))[1]


def not_finite(tensor: Tensor) -> str | None:
    """Return ``"NaN"`` or ``"Inf"`` if a tensor has any; `None` if all of it is finite."""
    tensor = tensor.detach()
    if bool(torch.isfinite(tensor).all()):
        return None
    return "NaN" if bool(torch.isnan(tensor).any()) else "Inf"


def _before(module: nn.Module, args: Any) -> None:
    watch = innermost(FiniteWatch)
    if watch is not None:
        watch._enter_module(module, args)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    watch = innermost(FiniteWatch)
    if watch is not None:
        watch._leave_module(output)


def _looked_at(value: Any) -> Iterable[Tensor]:
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.is_meta:
            continue
        if leaf.numel() and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _told(place: Place, module: str | None) -> str:
    words = place if isinstance(place, str) else place()
    words = words.removesuffix(", in backward")
    return words if module is None else re.sub(r", in `[^`]*`$", "", words)


def _line() -> str | None:
    """File and line of the user's that the calling thread is at."""
    frame: Any = frame_above(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        path = Path(frame.f_code.co_filename)
        if package not in _NOT_THE_USERS and not _is_ours(path) and path.suffix == ".py":
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _is_ours(path: Path) -> bool:
    return path.is_relative_to(_OURS) and "demo" not in path.parts
