"""Where in a thread's autograd graph a tensor was made.

Autograd numbers the nodes that a thread makes. That tells what was made before a certain moment
without a mark on any tensor.
"""

from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def now() -> int:
    """The number that the next node will have which this thread makes."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def of(tensor: Tensor) -> int | None:
    """The number of the node that made a tensor; `None` if no node has."""
    node = tensor.grad_fn
    return None if node is None else of_node(node)


def of_node(node: Any) -> int:
    """The number of a node."""
    number: int = node._sequence_nr()
    return number
