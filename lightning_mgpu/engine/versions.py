"""Version counters of tensors that share memory."""

from typing import Any

from torch import Tensor


def own_version(value: Any) -> Any:
    """A tensor over the same memory with a version counter of its own; anything else as it is.

    The shards of a batch are views of it and have one counter in common: if one replica writes to
    its shard in place, autograd would take what the others have saved of theirs for overwritten.
    """
    if type(value) is not Tensor or value.requires_grad or value.is_inference():
        return value
    return value.data
