"""What we need of the private attributes of a LightningModule, its logging and its optimizers."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mgpu._compat.lightning import LightningModule, _DeviceDtypeModuleMixin

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Strategy

_LOG = inspect.signature(LightningModule.log)


def own_attributes() -> frozenset[str]:
    """Names of the attributes of a LightningModule that Lightning keeps for itself."""
    made = vars(LightningModule()).keys() - vars(nn.Module()).keys()
    # Those that `save_hyperparameters` adds.
    return frozenset(made) | {"_hparams_initial", "_hparams_name", "_log_hyperparams"}


def set_trainer(module: LightningModule, trainer: Any) -> None:
    """Have one module find `trainer`, whatever it is; the setter would tell its children, too."""
    state = vars(module)
    if "_trainer" not in state:
        raise AttributeError(f"`{type(module).__name__}` has no `_trainer`.")
    state["_trainer"] = trainer


def set_device(module: nn.Module, device: torch.device) -> None:
    """Have Lightning's modules and metrics say that they are on `device`; moves nothing."""
    if isinstance(module, _DeviceDtypeModuleMixin):
        if "_device" not in vars(module):
            raise AttributeError(f"`{type(module).__name__}` has no `_device`.")
        module._device = device


def log_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of `LightningModule.log` behind name and value, by their names.

    Those of an override with other parameters are what it is given by name.
    """
    try:
        return _LOG.bind_partial(None, "", None, *args, **kwargs).arguments
    except TypeError:
        return kwargs


def with_batch_size(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `LightningModule.log` behind name and value, with another `batch_size`."""
    position = list(_LOG.parameters).index("batch_size") - 3  # behind self, name and value
    if len(args) <= position:
        return args, {**kwargs, "batch_size": batch_size}
    return (*args[:position], batch_size, *args[position + 1 :]), dict(kwargs)


def lightning_optimizers(strategy: "Strategy") -> list[Any]:
    """The Trainer's optimizers as `LightningModule.optimizers()` hands them out."""
    return strategy._lightning_optimizers
