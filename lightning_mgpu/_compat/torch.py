"""Private names of torch: autograd, dispatch, generators and process groups.

Its modules and hooks are in `torch_modules`, pickling in `torch_pickling`, and the words of its
errors in `torch_messages`.
"""

import operator
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves as tree_leaves

from lightning_mgpu._compat.release import assign

# Names that are used for each operation are bound here once, without a function of our own around.

# --- Autograd

version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""How often a tensor, or one that shares its counter, has been written to in place."""

is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether autograd takes a tensor for a view of another."""

base_of: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")
"""The tensor that another is a view of, to autograd; `None` if it is none."""

next_node_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""The number that the next node will have which the calling thread makes."""

backward_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
"""Within a node's backward: whether the pass was called with ``retain_graph``."""


node_number: Callable[[Any], int] = operator.methodcaller("_sequence_nr")
"""The number of an autograd node (`Tensor.grad_fn`), in the order of the thread that made it."""


def node_at_hand() -> Any:
    """The autograd node whose backward the calling thread computes; `None` outside of any."""
    return torch._C._current_autograd_node()


def version_kept(tensor: Tensor) -> AbstractContextManager[None]:
    """A context after which a tensor's version counter stands where it stood before."""
    return _unsafe_preserve_version_counter(tensor)


def scales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer unscales gradients in its own step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# --- Operations

add_to_each: Callable[..., None] = torch._foreach_add_
"""Add to tensors in place, each of the first list with its counterpart in the second."""

copy_to_each: Callable[..., None] = torch._foreach_copy_
"""Copy to tensors in place, to each of the first list its counterpart in the second."""

ATEN_ADD_TO_EACH: Any = torch.ops.aten._foreach_add_
"""The operation behind that, as a dispatch mode sees it."""

ATEN_COPY: Any = torch.ops.aten._to_copy
"""What `Tensor.to` is for a dispatch mode."""

schema_of: Callable[[Any], Any] = operator.attrgetter("_schema")
"""The arguments of an operation that a dispatch mode sees (`torch._C.FunctionSchema`)."""

dispatch_modes: Callable[[], list[TorchDispatchMode]] = _get_current_dispatch_mode_stack
"""The dispatch modes of the calling thread, the innermost last."""

innermost_function_mode: Callable[[], Any] = torch.overrides._get_current_function_mode
"""The `TorchFunctionMode` that the calling thread has entered last; `None` if it has none."""


def saves_are_hooked() -> bool:
    """Whether what operations save for backward is packed, as by activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that does not hand its whole call to function modes."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


attention_with_modes = _without_dispatch(torch.nn.functional.multi_head_attention_forward)
"""`torch.nn.functional.multi_head_attention_forward`, of which modes see each operation."""

is_functorch_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether it is a tensor within a transformation of `torch.func`."""


# --- Generators


def put_host_generator(generator: Any) -> None:
    """Have `torch.get_rng_state` and its like use this in place of `torch.default_generator`."""
    assign(torch.random, "default_generator", generator, "torch")


def device_generators(kind: Any) -> tuple[torch.Generator, ...]:
    """The generators of all devices of a kind.

    Args:
        kind: The module of the kind, such as `torch.cuda`.
    """
    return tuple(kind.default_generators)


def put_device_generators(kind: Any, generators: Sequence[Any]) -> None:
    """Have that module's `get_rng_state` and its like use other ones."""
    assign(kind, "default_generators", tuple(generators), "torch")


# --- Process groups


def forget_failed_group() -> None:
    """Count process groups from none again.

    One whose initialisation failed was counted already, and the next one would wait for keys under
    another name than its peers.
    """
    from torch.distributed.distributed_c10d import _world

    assign(_world, "group_count", 0, "torch")


def abort_communicators() -> None:
    """Abort those of the default group, also while another thread waits for them."""
    from torch.distributed.distributed_c10d import _abort_process_group

    _abort_process_group()


WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What FSDP and activation checkpointing put into the names of what they wrap."""


# --- Learning rates


def inner_schedulers(scheduler: Any) -> Sequence[Any]:
    """Those that a `SequentialLR` or `ChainedScheduler` is made of; none for other ones."""
    found: Sequence[Any] = getattr(scheduler, "_schedulers", ())
    return found


def learning_rates(scheduler: Any) -> list[list[Any]]:
    """The rates that a scheduler has started from, and those it has set last, if it keeps any.

    Each is a list with one for each group of parameters, and may be changed.
    """
    found = (getattr(scheduler, name, None) for name in ("base_lrs", "_last_lr"))
    return [rates for rates in found if rates is not None]
