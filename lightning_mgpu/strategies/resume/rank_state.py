"""What a rank knows in the middle of an epoch, beside weights, optimizers and counters."""

from collections.abc import Collection
from typing import Any

import torch
from torchmetrics import Metric

from lightning_mgpu._compat.lightning import LightningModule, Trainer
from lightning_mgpu._compat.lightning_restart import batches_trained
from lightning_mgpu._compat.torchmetrics import note_updates, reductions_of


def gathered(mine: Any) -> list[Any]:
    """What every rank has, in order of rank; called by all of them."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def metric_states(model: LightningModule, without: Collection[str]) -> dict[str, dict[str, Any]]:
    """States of the module's metrics that have been updated, by name; tensors on the host.

    Args:
        model: The module.
        without: Names of metrics that are left out.
    """
    return {
        name: {
            "updates": metric.update_count,
            "states": {part: _on_host(getattr(metric, part)) for part in reductions_of(metric)},
        }
        for name, metric in _metrics(model).items()
        if metric.update_count and name not in without
    }


def restore_metrics(model: LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Put states of metrics back, on each metric's own device."""
    metrics = _metrics(model)
    for name, known in states.items():
        metric = metrics.get(name)
        if metric is None:
            continue
        for part, value in known["states"].items():
            setattr(metric, part, _on_device(value, metric.device))
        note_updates(metric, known["updates"] - metric.update_count)


def reset_metrics(model: LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Put all metrics back; those that have no state here had not been updated."""
    for name, metric in _metrics(model).items():
        if name not in states and metric.update_count:
            metric.reset()
    restore_metrics(model, states)


def gradients(trainer: Trainer, model: LightningModule) -> dict[str, torch.Tensor]:
    """Gradients that are not yet used, by the parameter's name, on the host.

    With automatic optimisation those of an accumulation that is under way; else all that there are.
    """
    used = batches_trained(trainer)
    if model.automatic_optimization and used % trainer.accumulate_grad_batches == 0:
        return {}
    return {
        name: parameter.grad.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def restore_gradients(model: LightningModule, known: dict[str, torch.Tensor]) -> None:
    """Put gradients back to their parameters."""
    for name, parameter in model.named_parameters():
        if name in known:
            parameter.grad = known[name].to(parameter.device)


def _metrics(model: LightningModule) -> dict[str, Metric]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Metric)}


def _on_host(state: Any) -> Any:
    if isinstance(state, list):
        return [part.detach().cpu() for part in state]
    return state.detach().cpu().clone()


def _on_device(state: Any, device: torch.device) -> Any:
    if isinstance(state, list):
        return [part.to(device) for part in state]
    return state.to(device, copy=True)
