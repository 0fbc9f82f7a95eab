"""Outputs of many batches, taken apart by sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_array, is_container, parts, rebuild
from lightning_mgpu.engine.batch.joining import Joining
from lightning_mgpu.engine.batch.roles import JoinMemory, Role


def join_samples(
    outputs: Sequence[Any], sizes: Sequence[int], memory: JoinMemory | None = None
) -> "Samples | None":
    """Outputs of many batches, to be taken apart by sample; `None` where they cannot be.

    Args:
        outputs: One per batch.
        sizes: The number of samples in each batch.
        memory: As for `join`.
    """
    joiner = Joining(sizes, None, memory or JoinMemory(), None)
    try:
        joined = joiner.join(outputs, "output", None)
    except ValueError:
        return None
    by_sample = all(role in (0, "entries", "columns") for role in joiner.roles.values())
    return Samples(joined, joiner.roles) if by_sample and joiner.roles else None


class Samples:
    """Joined outputs, each part of which has an entry per sample.

    Attributes:
        joined: The outputs, joined.
    """

    def __init__(self, joined: Any, roles: Mapping[str, Role]) -> None:
        self.joined = joined
        self._roles = roles

    def take(self, order: Any) -> Any:
        """The samples at the given positions (an integer array), in that order."""
        return self._take(self.joined, order, "output")

    def _take(self, value: Any, order: Any, path: str) -> Any:
        if self._roles.get(path) == "entries":
            entries = list(value)
            return rebuild(value, [entries[i] for i in order])
        if is_container(value):
            return rebuild(value, [self._take(p, order, path + name) for name, p in parts(value)])
        if isinstance(value, Tensor):
            return value[torch.as_tensor(order, device=value.device)]
        if is_array(value):
            return value.iloc[order] if hasattr(value, "iloc") else value[order]
        return value
