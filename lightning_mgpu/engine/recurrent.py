"""Recurrent layers keep lists of their weights, in which what stands for a weight must be, too.

On an accelerator such a layer moves weights to memory of their own, side by side, when it finds
others than it has a list of, or when asked to (`flatten_parameters`). What stands for a weight must
stay where it is: else it would no longer follow the weight.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_mgpu.engine.entry_swap import MISSING


def stand_ins(
    module: nn.Module, stand_in: Callable[[Tensor], Tensor]
) -> list[tuple[dict[str, Any], str, Any, Any]]:
    """What to put into a layer beside its parameters, as `Patches` takes it.

    Args:
        module: Any module; of others than recurrent layers there is nothing.
        stand_in: Finds what stands for a weight.
    """
    if not isinstance(module, nn.RNNBase):
        return []
    state = vars(module)
    flat, references = state["_flat_weights"], state["_flat_weight_refs"]
    if len(flat) != len(references):  # (somebody is at it)
        return []
    new_flat, new_references = list(flat), list(references)
    for index, name in enumerate(state["_flat_weights_names"]):
        weight = module._parameters.get(name)
        if weight is not None:  # (else it is computed anew at each call, and found to be new)
            new_flat[index] = stand_in(weight)
            new_references[index] = weakref.ref(new_flat[index])
    return [
        (state, "_flat_weights", flat, new_flat),
        (state, "_flat_weight_refs", references, new_references),
        (state, "flatten_parameters", state.get("flatten_parameters", MISSING), _nothing),
    ]


def list_of_weights(module: nn.Module) -> list[Any] | None:
    """The list that a layer has of its weights; `None` if it makes a new one at each call."""
    state = vars(module)
    names = state.get("_flat_weights_names", ())
    if not names or any(name not in module._parameters for name in names):
        return None
    flat: list[Any] = state["_flat_weights"]
    return flat


def _nothing() -> None:
    """Leaves weights where they are."""
