"""Private attributes of `torch.nn.Module` and its layers."""

import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_mgpu._compat.release import assign, missing

BatchNorm = _BatchNorm
"""The base class of layers that normalise batches."""

Dropout = _DropoutNd
"""The base class of layers that drop out."""

# --- Parts

parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = operator.attrgetter(
    "_parameters"
)
"""The parameters that a module has itself, by name; may be changed."""

buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = operator.attrgetter("_buffers")
"""The buffers that a module has itself, by name; may be changed."""

children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = operator.attrgetter("_modules")
"""The modules that a module has itself, by name; may be changed."""

PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
"""The names of these attributes."""

BUFFERS_NOT_SAVED = "_non_persistent_buffers_set"
"""The attribute with the names of buffers that no state dict has."""

BLANK = frozenset(vars(nn.Module()))
"""The names of the attributes that every module has."""

map_tensors: Callable[[nn.Module, Callable[[Tensor], Tensor]], nn.Module] = nn.Module._apply
"""Replace each parameter and buffer of a module, as `Module.to` does."""

# --- Hooks

HOOKS = frozenset(
    name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)
)
"""The names of the attributes with hooks, and with what is known of some hooks."""

_before: Callable[[nn.Module], Any] = operator.attrgetter("_forward_pre_hooks")
_before_with_kwargs: Callable[[nn.Module], Any] = operator.attrgetter(
    "_forward_pre_hooks_with_kwargs"
)
_after: Callable[[nn.Module], Any] = operator.attrgetter("_forward_hooks")
_after_with_kwargs: Callable[[nn.Module], Any] = operator.attrgetter("_forward_hooks_with_kwargs")
_after_always: Callable[[nn.Module], Any] = operator.attrgetter("_forward_hooks_always_called")


def forward_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that are called before and after its `forward`."""
    return [*_after(module).values(), *_before(module).values()]


def forward_hook_tables(module: nn.Module) -> list[dict[Any, Any]]:
    """The mappings that hold these hooks, and what is known of some; may be changed."""
    return [
        _after(module),
        _after_with_kwargs(module),
        _after_always(module),
        _before(module),
        _before_with_kwargs(module),
    ]


# `Module.register_forward_hook` and its like take 10 us for a pair of hooks, and these 2. They are
# put in and taken out for each step and layer.


def attach(
    module: nn.Module, key: str, before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """Have hooks called before and after a module's `forward`, until `detach`.

    Args:
        module: The module.
        key: By which `detach` finds them.
        before: Called with the module and its arguments by position.
        after: Called with these and the output, unless `forward` has raised.
    """
    _before(module)[key] = before
    _after(module)[key] = after


def attach_around(
    module: nn.Module, key: str, before: Callable[..., Any], after: Callable[..., Any]
) -> None:
    """Have hooks called before all others, and after others were, until `detach`.

    Args:
        module: The module.
        key: By which `detach` finds them.
        before: Called with the module, its arguments by position and those by name.
        after: Called with the module, its arguments by position and the output; with an output of
            `None` where `forward` has raised.
    """
    attach(module, key, before, after)
    _before(module).move_to_end(key, last=False)
    _before_with_kwargs(module)[key] = True
    _after_always(module)[key] = True


def detach(module: nn.Module, key: str) -> None:
    """Take out what `attach` or `attach_around` has put in, if they have."""
    for table in (_before, _before_with_kwargs, _after, _after_always):
        table(module).pop(key, None)


# --- Compiled modules

COMPILED_CALL = "_compiled_call_impl"
"""The attribute with what a module calls that is compiled in place (`Module.compile`)."""

compiled_call: Callable[[nn.Module], Callable[..., Any] | None] = operator.attrgetter(COMPILED_CALL)
"""What a module calls that is compiled in place; `None` for any other."""

COMPILED_ATTRIBUTES = frozenset({"forward", "dynamo_ctx"})
"""What a module that `torch.compile` has made calls, bound to the one that it was made of."""


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Have a module that is compiled in place call something else."""
    assign(module, COMPILED_CALL, call, "torch")


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was made by `torch.compile`."""
    # Costs a second to import, and nothing is compiled as long as nobody has.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_compiled_anyhow(module: nn.Module) -> bool:
    """Return whether a module calls compiled code, made of itself or of another module."""
    return compiled_call(module) is not None or is_compiled(module)


original_of: Callable[[nn.Module], nn.Module] = operator.attrgetter("_orig_mod")
"""The module that `torch.compile` has made another of."""


def inside_compiled(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of all modules that are part of one that `torch.compile` has made."""
    return {
        id(inner)
        for module in modules
        if is_compiled(module)
        for inner in original_of(module).modules()
    }


def compile_again(original: Any, copied: Any, inner: nn.Module) -> None:
    """Have the copy of a compiled module call `inner`, the copy of what that was made of."""
    made = type(original)(inner, original.dynamo_ctx)
    vars(copied).update({key: vars(made)[key] for key in COMPILED_ATTRIBUTES})


# --- Recurrent layers

WEIGHTS, WEIGHT_REFERENCES = "_flat_weights", "_flat_weight_refs"
"""The attributes of a recurrent layer with its weights, and with weak references to them."""

_WEIGHT_NAMES = "_flat_weights_names"


@dataclass(frozen=True)
class LayerWeights:
    """State of a recurrent layer beside its parameters.

    Attributes:
        names: The parameters that it is made of.
        weights: These parameters, or what stands for them, in that order.
        references: Weak references to them.
    """

    names: list[str]
    weights: list[Any]
    references: list[Any]


def weights_of(layer: nn.RNNBase) -> LayerWeights:
    """The lists of its weights that a recurrent layer keeps.

    Raises:
        AttributeError: This release of torch keeps others.
    """
    state = vars(layer)
    if not state.keys() >= {_WEIGHT_NAMES, WEIGHTS, WEIGHT_REFERENCES}:
        raise missing(f"the lists of weights of a `{type(layer).__name__}`", "torch")
    return LayerWeights(state[_WEIGHT_NAMES], state[WEIGHTS], state[WEIGHT_REFERENCES])


def has_weights(layer: nn.RNNBase) -> bool:
    """Return whether a recurrent layer has made its lists yet."""
    return bool(vars(layer).get(_WEIGHT_NAMES))


def ignored_by_ddp(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that `DistributedDataParallel` is to leave alone."""
    return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
