"""Find the submodules that a module's `forward` calls, by observing a call."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu._compat.torch import version_of
from lightning_mgpu._compat.torch_modules import Dropout, inside_compiled, is_compiled_anyhow
from lightning_mgpu.engine.device import synchronize
from lightning_mgpu.engine.pipeline import stage_values


@dataclass(eq=False)
class ModuleCall:
    """A call of a module.

    Attributes:
        name: The module's first name; that of the split module itself is empty.
        module: The module.
        children: The calls that it makes.
        began: When.
        seconds: What it took, calls it made included.
        kept: The bytes that autograd kept of it, if that was counted.
        kept_before: Those that it had kept of the split module when the call began.
        counted_before: What a counter of the caller's said then.
        received: The bytes of the tensors that it was called with.
        inputs: The same, by the memory's number, if bytes were counted.
        returned: The bytes of the tensors that it returned.
        writes: Whether it has written to what it was called with, or would in training.
    """

    name: str
    module: nn.Module
    children: list["ModuleCall"] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0
    kept: int = 0
    kept_before: int = 0
    counted_before: int = 0
    received: int = 0
    inputs: dict[int, int] = field(default_factory=dict)
    returned: int = 0
    writes: bool = False
    given: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors among the arguments, with their version counters at the call."""

    def walk(self) -> Iterator["ModuleCall"]:
        """This call and all below, in order."""
        yield self
        for child in self.children:
            yield from child.walk()


def registered(module: nn.Module, name: str = "") -> ModuleCall:
    """Calls to expect of a module whose `forward` calls its children in order."""
    children = [] if is_compiled_anyhow(module) else module.named_children()
    prefix = f"{name}." if name else ""
    return ModuleCall(name, module, [registered(child, prefix + n) for n, child in children])


def observe(
    module: nn.Module,
    run: Callable[[], Any],
    count_kept: bool = False,
    counter: Callable[[], int] = lambda: 0,
) -> tuple[ModuleCall, Any]:
    """Watch a call of a module.

    Args:
        module: The module.
        run: Calls its `forward`.
        count_kept: Whether to count what autograd keeps.
        counter: Asked at each call.

    Returns:
        The call, and what `run` has returned.
    """
    root = ModuleCall("", module)
    open_calls = [root]
    compiled = inside_compiled(module.modules())
    fixed = (*module.parameters(), *module.buffers())
    devices = {tensor.device for tensor in fixed}

    def now() -> float:
        synchronize(devices)
        return time.perf_counter()

    def before(called: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        given = [t for t in stage_values.tensors((args, kwargs)) if not t.is_inference()]
        if isinstance(called, Dropout) and called.inplace:
            _mark(open_calls, given)  # (which drops nothing while it is watched)
        made = ModuleCall(name, called, given=[(t, version_of(t)) for t in given])
        made.received = _bytes(given)
        made.counted_before = counter()
        if count_kept:
            made.kept_before = root.kept
            for tensor in given:
                number, size = numbered(tensor), tensor.nbytes
                made.inputs[number] = max(size, made.inputs.get(number, 0))
        made.began = now()
        open_calls[-1].children.append(made)
        open_calls.append(made)

    def after(called: nn.Module, args: Any, output: Any) -> None:
        if len(open_calls) > 1 and open_calls[-1].module is called:
            made = open_calls.pop()
            made.seconds = now() - made.began
            made.returned = _bytes(output)
            made.writes |= any(version_of(tensor) != version for tensor, version in made.given)
            made.given = []

    memories: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def numbered(tensor: Tensor) -> int:
        # Held on to, so that nothing else gets the same address.
        memory = tensor.untyped_storage()
        return memories.setdefault(memory.data_ptr(), (len(memories), memory))[0]

    own = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage().data_ptr()
        if memory not in own and memory not in seen:
            seen.add(memory)
            for call in open_calls:
                call.kept += tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as stack:
        for name, inner in module.named_modules():
            if (
                inner is module
                or id(inner) in compiled
                or isinstance(inner, torch.jit.ScriptModule)
            ):
                continue
            hook = inner.register_forward_pre_hook(
                _named(before, name), prepend=True, with_kwargs=True
            )
            stack.callback(hook.remove)
            stack.callback(inner.register_forward_hook(after, always_call=True).remove)
        if count_kept:
            stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        root.began = now()
        output = run()
        root.seconds = now() - root.began
    root.returned = _bytes(output)
    return root, output


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in stage_values.tensors(value))


def _mark(calls: Sequence[ModuleCall], tensors: Sequence[Tensor]) -> None:
    """Record which of its tensor arguments a call writes to."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for call in calls:
        if any(given.untyped_storage().data_ptr() in memory for given, _ in call.given):
            call.writes = True


def _named(before: Callable[..., None], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        before(module, args, kwargs, name)

    return hook
