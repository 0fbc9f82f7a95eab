"""What has been logged in the training epoch so far, to take and to put back."""

import builtins
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.lightning_restart import is_last_batch

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer

_PARTS = "value", "cumulated_batch_size", "_forward_cache"
_ARGUMENTS = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "metric_attribute"),
)


def logged_so_far(trainer: "Trainer") -> dict[str, Any]:
    """What the epoch has logged: with which arguments, and sums.

    Returns:
        Numbers, strings and tensors on the host, as this rank has them.
    """
    results = trainer.fit_loop.epoch_loop._results
    connector = trainer._logger_connector
    is_first_batch = connector._first_loop_iter
    if trainer.validating:
        # It has its own; Lightning puts that of training back afterwards, within an epoch.
        is_first_batch = None if is_last_batch(trainer) else True
    return {
        "results": [_described(result) for result in results.values() if not result.has_reset],
        "is_first_batch": is_first_batch,
        "hook": connector._current_fx,
    }


def go_on_logging(trainer: "Trainer", logged: dict[str, Any]) -> None:
    """Have the epoch go on with what was logged before.

    Args:
        trainer: In an epoch that has not begun to log yet.
        logged: What `logged_so_far` has returned.
    """
    model = trainer.lightning_module
    modules = dict(model.named_modules())
    results = trainer.fit_loop.epoch_loop._results
    results.clear()  # of a run that was interrupted
    assign(trainer._logger_connector, "_first_loop_iter", logged["is_first_batch"])
    assign(trainer._logger_connector, "_current_fx", logged["hook"])
    for known in logged["results"]:
        arguments = dict(known["arguments"])
        value: Any = torch.zeros((), device=trainer.strategy.root_device)
        if known["is_metric"]:
            value = modules.get(arguments["metric_attribute"])
            if value is None:
                continue
        namespace, reduction = known["reduction"]
        before = set(results)
        results.log(
            value=value,
            reduce_fx=getattr(_REDUCTIONS[namespace], reduction),
            sync_dist=known["syncs"],
            sync_dist_fn=trainer.strategy.reduce,
            rank_zero_only=known["rank_zero_only"],
            batch_size=1,
            **arguments,
        )
        (key,) = set(results) - before
        for name, part in known["parts"].items():
            assign(results[key], name, part.to(value.device))


def metrics_to_reset(trainer: "Trainer", at_epoch_end: bool) -> set[str]:
    """Names of the module's metrics that are reset before anything is added to them.

    Those that validation has logged, and those of a training epoch that is over.
    """
    loop = trainer.fit_loop.epoch_loop
    results = [*loop.val_loop._results.values(), *(loop._results.values() if at_epoch_end else ())]
    return {result.meta.metric_attribute for result in results} - {None}


def synced_names(trainer: "Trainer") -> list[str]:
    """Names that the training epoch has logged so far and averages over all ranks, in order."""
    results = trainer.fit_loop.epoch_loop._results
    syncs = [(name, result.meta.sync) for name, result in results.items()]
    return [
        name
        for name, sync in syncs
        if sync.should and not sync.rank_zero_only and sync._group is None
    ]


def callback_metrics(trainer: "Trainer") -> dict[str, torch.Tensor]:
    """What callbacks and schedulers may monitor, on the host."""
    return {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}


def set_callback_metrics(trainer: "Trainer", metrics: dict[str, torch.Tensor]) -> None:
    """Let callbacks and schedulers monitor these, until they are logged again."""
    trainer._logger_connector._callback_metrics.update(metrics)


_REDUCTIONS: dict[str, Any] = {"torch": torch, "builtins": builtins}


def _described(result: Any) -> dict[str, Any]:
    meta = result.meta
    reduction = meta.reduce_fx
    is_metric = isinstance(getattr(result, "value", None), nn.Module)
    parts = {name: getattr(result, name, None) for name in _PARTS}
    return {
        "arguments": {name: getattr(meta, name) for name in _ARGUMENTS},
        "reduction": ["builtins" if reduction in (max, min, sum) else "torch", reduction.__name__],
        "syncs": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "is_metric": is_metric,
        "parts": {
            name: part.detach().cpu()
            for name, part in parts.items()
            if isinstance(part, torch.Tensor)
        },
    }
