"""Apply mutated hyperparameters after a checkpoint has restored the old ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_mgpu._compat.torch import inner_schedulers, learning_rates

Groups = list[list[dict[str, Any]]]
"""For each optimizer and each of its parameter groups: hyperparameters by name."""


@dataclass(frozen=True)
class Mutation:
    """A changed hyperparameter."""

    optimizer: int
    group: int
    name: str
    old: Any
    new: Any


def describe(optimizers: Sequence[Optimizer]) -> Groups:
    """Hyperparameters of newly built optimizers, as plain values."""
    return [
        [
            {name: _plain(value) for name, value in _initial(group).items() if name != "params"}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]


def compare(old: Groups, new: Groups) -> list[Mutation]:
    """Changes from the run that saved a checkpoint to the one that restores it."""
    return [
        Mutation(number, index, name, before[name], after[name])
        for number, (old_groups, new_groups) in enumerate(zip(old, new, strict=False))
        for index, (before, after) in enumerate(zip(old_groups, new_groups, strict=False))
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]


def apply(
    mutations: Sequence[Mutation],
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[LRSchedulerConfig],
) -> None:
    """Set the new values in restored optimizers and schedulers.

    A learning rate keeps what schedulers have made of it so far: one that was halved stays halved.
    """
    for change in mutations:
        optimizer = optimizers[change.optimizer]
        group = optimizer.param_groups[change.group]
        if change.name != "lr":
            group[change.name] = change.new
            continue
        factor = float(change.new) / float(change.old) if change.old else 0.0
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] = _scaled(group[name], factor, change.new)
        for config in schedulers:
            if getattr(config.scheduler, "optimizer", None) is optimizer:
                _rescale(config.scheduler, change.group, factor, change.new)


def _rescale(scheduler: Any, group: int, factor: float, new: Any) -> None:
    for inner in inner_schedulers(scheduler):
        _rescale(inner, group, factor, new)
    for rates in learning_rates(scheduler):
        rates[group] = _scaled(rates[group], factor, new)


def _scaled(value: Any, factor: float, new: Any) -> Any:
    return value * factor if factor else new


def _initial(group: dict[str, Any]) -> dict[str, Any]:
    # A scheduler's warm-up may have changed `lr` in its constructor.
    return {**group, "lr": group["initial_lr"]} if "initial_lr" in group else group


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else float(value)
