"""Recurrent layers keep lists of their weights, in which what stands for a weight must be, too.

On an accelerator such a layer moves weights to memory of their own, side by side, when it finds
others than it has a list of, or when asked to (`flatten_parameters`). What stands for a weight must
stay where it is: else it would no longer follow the weight.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_mgpu.engine.patches import MISSING

__all__: list[str] = []


def stand_ins(
    module: nn.Module, stand_in: Callable[[Tensor], Tensor]
) -> list[tuple[dict[str, Any], str, Any, Any]]:
    """What to put into a layer beside its parameters, as `Patches` takes it.

    Args:
        module: Any module; of others than recurrent layers there is nothing.
        stand_in: Finds what stands for a weight.
    """
    state = vars(module)
    if not isinstance(module, nn.RNNBase) or "_flat_weight_refs" not in state:
        return []
    names, flat = state["_flat_weights_names"], state["_flat_weights"]
    own = [module._parameters.get(name) for name in names]
    weights = [stand_in(weight) if weight is not None else None for weight in own]
    # (A parametrised weight is computed anew at each call.)
    kept = [new if new is not None else old for new, old in zip(weights, flat, strict=True)]
    references = [None if weight is None else weakref.ref(weight) for weight in weights]
    return [
        (state, "_flat_weights", flat, kept),
        (state, "_flat_weight_refs", state["_flat_weight_refs"], references),
        (state, "flatten_parameters", state.get("flatten_parameters", MISSING), _nothing),
    ]


def _nothing() -> None:
    """Leaves weights where they are."""
