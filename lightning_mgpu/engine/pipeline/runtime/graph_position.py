"""Position of a tensor in its thread's autograd graph.

Autograd numbers the nodes that a thread makes. That tells what was made before a certain moment
without a mark on any tensor.
"""

from typing import Any

from torch import Tensor

from lightning_mgpu._compat.torch import base_of, is_view, node_number


def of(tensor: Tensor) -> int | None:
    """Sequence number of the node that made a tensor; `None` if no node has."""
    node: Any = tensor.grad_fn
    if node is None:
        return None
    number = node_number(node)
    if is_view(tensor):
        # Its node is made anew when its base has been written to.
        base = base_of(tensor)
        made_at = None if base is None else of(base)
        number = number if made_at is None else min(number, made_at)
    return number
