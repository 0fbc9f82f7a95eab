"""Refuse, before training, what a process with several devices cannot run."""

from typing import TYPE_CHECKING

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_mgpu._compat.lightning import MisconfigurationException, is_param_in_hook_signature
from lightning_mgpu._compat.torch_modules import compiled_call

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import LightningModule

_DDP = "`strategy='mgpu_ddp'` (`+strategy=ddp` on the command line)"


def check_one_process(strategy: str, num_nodes: int, world_size: int) -> None:
    """Refuse several nodes, and ranks started from outside.

    Raises:
        MisconfigurationException: Says which argument is at fault and what to do.
    """
    if num_nodes > 1:
        raise MisconfigurationException(
            f"`{strategy}` with `Trainer(num_nodes={num_nodes})`: this strategy runs in one"
            f" process on one machine. For several machines use {_DDP} with `torchrun` or"
            " SLURM."
        )
    if world_size > 1:
        raise MisconfigurationException(
            f"`{strategy}` in one of {world_size} processes: this strategy uses all devices"
            " from a single process. Start the program without `torchrun` or `srun`, or use"
            f" {_DDP}."
        )


def check_module(strategy: str, model: "LightningModule") -> None:
    """Refuse modules that cannot be computed in parts.

    Raises:
        MisconfigurationException: Names the module at fault and what to do.
    """
    # (What `torch.compile(model)` returns, Lightning itself refuses.)
    if compiled_call(model) is not None:
        raise MisconfigurationException(
            f"`{type(model).__name__}` is compiled as a whole, and `{strategy}` has to run its"
            " steps for each device. Compile a submodule instead: `self.net ="
            " torch.compile(self.net)`."
        )
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(model, step), "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"`{type(model).__name__}.{step}(dataloader_iter)` fetches its own batches,"
                f" which `{strategy}` cannot split. Use `{step}(batch, batch_idx)`."
            )
    for name, module in model.named_modules():
        _check_submodule(strategy, name, module)


def check_layer_sync(strategy: str, wanted: bool) -> None:
    """Refuse ``Trainer(sync_batchnorm=True)``.

    Raises:
        MisconfigurationException: If it is `wanted`.
    """
    if wanted:
        raise MisconfigurationException(
            f"`{strategy}` with `Trainer(sync_batchnorm=True)`: synchronised batch"
            f" normalisation needs a process per device. Remove it, or use {_DDP}."
        )


def has_synchronised_layers(module: torch.nn.Module) -> bool:
    """Return whether forward waits for all ranks, to normalise batches together."""
    return any(isinstance(each, torch.nn.SyncBatchNorm) for each in module.modules())


def _check_submodule(strategy: str, name: str, module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.SyncBatchNorm):
        raise MisconfigurationException(
            f"`{name}` is a `SyncBatchNorm`, which needs a process per device. Use `BatchNorm`"
            f" with `{strategy}`, or use {_DDP}."
        )
    if isinstance(module, LazyModuleMixin) or any(
        torch.nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)
    ):
        raise MisconfigurationException(
            f"`{name}` has parameters without a shape yet. Run a batch through the model"
            f" before `Trainer.fit`, for instance in `configure_model`, to use `{strategy}`."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise MisconfigurationException(
            f"`{name}` is compiled by TorchScript, and cannot have a replica. Use the plain"
            f" module with `{strategy}`."
        )
