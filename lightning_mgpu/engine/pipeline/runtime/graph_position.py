"""Where in a thread's autograd graph a tensor was made.

Autograd numbers the nodes that a thread makes. That tells what was made before a certain moment
without a mark on any tensor.
"""

from typing import Any

import torch
from torch import Tensor


def now() -> int:
    """The number that the next node will have which this thread makes."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def of(tensor: Tensor) -> int | None:
    """The number of the node that made a tensor; `None` if no node has."""
    node: Any = tensor.grad_fn
    if node is None:
        return None
    number: int = node._sequence_nr()
    if tensor._is_view():
        # Its node is made anew when its base has been written to.
        base = None if tensor._base is None else of(tensor._base)
        number = number if base is None else min(number, base)
    return number
