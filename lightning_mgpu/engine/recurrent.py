"""Replace weights in the lists that recurrent layers keep of them.

On an accelerator such a layer moves weights to memory of their own, side by side, when it finds
others than it has a list of, or when asked to (`flatten_parameters`). What stands for a weight must
stay where it is: else it would no longer follow the weight.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import (
    WEIGHT_REFERENCES,
    WEIGHTS,
    has_weights,
    parameters_of,
    weights_of,
)
from lightning_mgpu.engine.entry_swap import MISSING


def stand_ins(
    module: nn.Module, stand_in: Callable[[Tensor], Tensor]
) -> list[tuple[dict[str, Any], str, Any, Any]]:
    """Replacements for a recurrent layer's lists of weights, as `EntrySwap` takes them.

    Args:
        module: Any module; of others than recurrent layers there is nothing.
        stand_in: Finds what stands for a weight.
    """
    if not isinstance(module, nn.RNNBase):
        return []
    state, held = vars(module), weights_of(module)
    if len(held.weights) != len(held.references):  # (somebody is at it)
        return []
    parameters = parameters_of(module)
    new_weights, new_references = list(held.weights), list(held.references)
    for index, name in enumerate(held.names):
        weight = parameters.get(name)
        if weight is not None:  # (else it is computed anew at each call, and found to be new)
            new_weights[index] = stand_in(weight)
            new_references[index] = weakref.ref(new_weights[index])
    return [
        (state, WEIGHTS, held.weights, new_weights),
        (state, WEIGHT_REFERENCES, held.references, new_references),
        (state, "flatten_parameters", state.get("flatten_parameters", MISSING), _nothing),
    ]


def list_of_weights(module: nn.Module) -> list[Any] | None:
    """A layer's own list of its weights; `None` if it makes a new one at each call."""
    if not isinstance(module, nn.RNNBase) or not has_weights(module):
        return None
    held, parameters = weights_of(module), parameters_of(module)
    return held.weights if all(name in parameters for name in held.names) else None


def _nothing() -> None:
    """Leave weights in place (a replacement for `flatten_parameters`)."""
