"""Track which parameters `DistributedDataParallel` averages over the ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Reduced:
    """Parameters that a `DistributedDataParallel` averages: those trainable when it was built.

    Args:
        model: Just built.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        self._ignored = model.parameters_to_ignore
        named = self._named()
        # By identity, and held, so that no other parameter gets the identity.
        self._parameters = {id(p): p for _, p in named if p.requires_grad}
        self._others = [(name, p) for name, p in named if not p.requires_grad]

    def outdated(self, may_shrink: bool) -> list[nn.Parameter] | None:
        """Parameters to average from now on; `None` if those are averaged already.

        Args:
            may_shrink: Whether to leave out parameters that were frozen since.

        Raises:
            MisconfigurationException: A new parameter has a gradient, which was not averaged.
        """
        trainable = {id(p): p for p in self._model.module.parameters() if p.requires_grad}
        if trainable.keys() == self._parameters.keys() or not trainable:
            return None
        named = self._named()
        wanted = [
            (name, p)
            for name, p in named
            if p.requires_grad or (not may_shrink and id(p) in self._parameters)
        ]
        added = [(name, p) for name, p in wanted if id(p) not in self._parameters]
        if not added and (not may_shrink or len(wanted) == len(self._parameters)):
            return None
        old = {id(p) for _, p in self._others}
        _refuse([(name, p) for name, p in added if id(p) not in old])
        return [p for _, p in wanted]

    def check_gradients(self) -> None:
        """Raise an error for gradients that were not averaged; called after each backward.

        Raises:
            MisconfigurationException: Names the parameter, before an optimizer uses its gradient.
        """
        _refuse([(name, p) for name, p in self._others if p.requires_grad])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        named = self._model.module.named_parameters()
        return [(name, p) for name, p in named if name not in self._ignored]


@contextmanager
def as_trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters require gradients."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Context after which a module's buffers are restored: each rank has its own values."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def release(model: DistributedDataParallel) -> nn.Module:
    """Unwrap a module; the hooks on its parameters go with the reducer."""
    module: nn.Module = model.module
    del model.logger, model.reducer  # the one holds the other
    return module


def forget_buckets(state: Any) -> None:
    """Reset PowerSGD, whose state for each bucket does not fit other buckets."""
    if hasattr(state, "error_dict"):
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
        state.iter = 0


def _refuse(parameters: list[tuple[str, nn.Parameter]]) -> None:
    late = [name for name, parameter in parameters if parameter.grad is not None]
    if late:
        raise MisconfigurationException(
            f"`{late[0]}`{f' and {len(late) - 1} more' if len(late) > 1 else ''} became trainable"
            " within `training_step`, too late for its gradient to be averaged over the ranks."
            " Unfreeze or add parameters in a hook that comes before the step, such as"
            " `on_train_epoch_start` or `on_train_batch_start`."
        )
