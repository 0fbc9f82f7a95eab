"""The tensors of a model and of its optimizers, put together from wherever its ranks keep them."""

from dataclasses import dataclass
from typing import Any

import torch

from lightning_mgpu._compat.torch import WRAPPERS


@dataclass(frozen=True)
class Whole:
    """What rank 0 sends home.

    Attributes:
        weights: The model's tensors by name; `None` if the run has not changed them.
        optimizer_states: For each optimizer its state by the parameter's name; `None` if the
            optimizers hold it themselves.
    """

    weights: dict[str, torch.Tensor] | None
    optimizer_states: list[dict[str, Any]] | None = None


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a model, also those that no state dict has."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): tensor for name, tensor in named}


def plain_name(name: str) -> str:
    """A module's or tensor's name as it is without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
