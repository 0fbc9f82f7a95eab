"""Gather the tensors of a model and its optimizers from all ranks."""

from dataclasses import dataclass
from typing import Any

import torch

from lightning_mgpu._compat.torch import WRAPPERS


@dataclass(frozen=True)
class GatheredState:
    """Tensors that rank 0 sends to the driver.

    Attributes:
        weights: The model's tensors by name; `None` if the run has not changed them.
        optimizer_states: For each optimizer its state by the parameter's name; `None` if the
            optimizers hold it themselves.
    """

    weights: dict[str, torch.Tensor] | None
    optimizer_states: list[dict[str, Any]] | None = None


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a model, also those missing in its state dict."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): tensor for name, tensor in named}


def plain_name(name: str) -> str:
    """Name of a module or tensor without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
