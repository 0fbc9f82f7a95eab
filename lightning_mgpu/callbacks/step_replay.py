"""Compute a step again to find out where it goes wrong."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import DDPStrategy, LightningModule, Trainer
from lightning_mgpu.callbacks.log_override import logging_to
from lightning_mgpu.callbacks.step_record import StepRecord, as_before
from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.finite_watch import FiniteWatch, not_finite
from lightning_mgpu.strategies.base.checks import has_synchronised_layers
from lightning_mgpu.strategies.base.module_names import module_names

_MOST_NAMES = 3


@dataclass(frozen=True)
class Found:
    """What a look for the first NaN or Inf has found on a rank.

    Attributes:
        place: Where it is, in words; `None` if it was not found.
        note: What else there is to say: values logged, or why it was not found.
        rank: Where.
    """

    place: str | None
    note: str = ""
    rank: int = 0


@dataclass
class _Logged:
    """What a step logs that is not finite."""

    names: dict[str, str] = field(default_factory=dict)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if isinstance(value, Tensor) and (what := not_finite(value)) is not None:
            self.names.setdefault(name, what)

    def __str__(self) -> str:
        found = [f"`{name}` is {what}" for name, what in self.names.items()]
        return f"Of what it logs, {', '.join(found)}." if found else ""


def find(trainer: Trainer, record: StepRecord | None) -> Found:
    """Find the first NaN or Inf of a step, by computing it again.

    Args:
        trainer: Between backward and the optimizer's step, so that weights are as before.
        record: Of that step; `None` if it is finite on this rank.
    """
    rank, model = trainer.global_rank, trainer.lightning_module
    if tensors := list(_not_finite_tensors(model)):
        more = f" and {len(tensors) - _MOST_NAMES} more" if len(tensors) > _MOST_NAMES else ""
        return Found(f"{', '.join(tensors[:_MOST_NAMES])}{more}, before the step", rank=rank)
    if record is None:
        return Found(None, rank=rank)
    if why := why_not_replayed(trainer):
        return Found(None, f"The step was not computed again to find out where: {why}.", rank)
    try:
        return _replayed(trainer, record)
    except Exception as error:  # such as too little memory: what is known is told all the same
        message = f"{type(error).__name__}: {error}"
        return Found(None, f"To compute the step again has failed ({message}).", rank)


def gradients_not_finite(model: LightningModule) -> str:
    """Which gradients have NaN or Inf, in words."""
    names = [
        f"`{name}` ({what})"
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (what := not_finite(local(parameter.grad))) is not None
    ]
    if not names:
        return ""
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"gradients of {', '.join(names[:_MOST_NAMES])}{rest}"


def local(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank: its part of one that is spread, all that a sparse one has."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.coalesce().values() if part.layout is torch.sparse_coo else part


def loss_of(output: Any) -> Tensor | None:
    """The loss that `training_step` has returned, if any."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _not_finite_tensors(model: LightningModule) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if (what := not_finite(local(parameter))) is not None:
            yield f"{what} is in the parameter `{name}`"


def why_not_replayed(trainer: Trainer) -> str | None:
    """Why steps of a run cannot be computed again; `None` if they can."""
    strategy = trainer.strategy
    if not trainer.lightning_module.automatic_optimization:
        return "with manual optimization it steps optimizers itself"
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        return f"`{type(strategy).__name__}` spreads the model over ranks"
    if trainer.world_size > 1 and has_synchronised_layers(trainer.lightning_module):
        return "`SyncBatchNorm` waits for all ranks, of which some may have no such step"
    return None


def _replayed(trainer: Trainer, record: StepRecord) -> Found:
    model, rank, logged = trainer.lightning_module, trainer.global_rank, _Logged()
    with ExitStack() as stack:
        for context in (as_before(trainer, record), _alone(trainer), logging_to(model, logged.log)):
            stack.enter_context(context)
        watch = FiniteWatch(module_names(trainer.strategy), dict(_given(model, record)))
        stack.enter_context(watch.watching())
        with torch.enable_grad():
            loss = loss_of(trainer.strategy.training_step(*record.args, **record.kwargs))
        if loss is None:
            return Found(None, "Computed again, the step returns no loss.", rank)
        if not_finite(loss) is not None:
            trace = watch.trace(loss)
            place = "in the loss, by operations that could not be seen" if trace is None else trace
            return Found(str(place), str(logged), rank)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        watch.begin_backward(loss)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        bad = {
            name: gradient
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None and not_finite(gradient) is not None
        }
        traces = [trace for gradient in bad.values() if (trace := watch.trace(gradient))]
    if traces:
        return Found(str(min(traces, key=lambda trace: trace.first.order)), str(logged), rank)
    if bad:
        name = next(iter(bad))
        return Found(f"in the gradient of `{name}`, by operations that could not be seen", "", rank)
    return Found(
        None,
        "Computed again from the same batch, weights and random states, the step is finite: it is"
        " not deterministic, or depends on attributes that it has changed.",
        rank,
    )


def _given(model: LightningModule, record: StepRecord) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(record.args[0] if record.args else None):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_meta:
            yield f"the batch (`{path}`{_samples(leaf)})", leaf
    for name, parameter in model.named_parameters():
        yield f"the parameter `{name}`", parameter
    for name, buffer in model.named_buffers():
        yield f"the buffer `{name}`", buffer


def _samples(tensor: Tensor) -> str:
    """Which entries of a part of the batch are not finite, in words."""
    if not tensor.is_floating_point() or tensor.dim() < 1 or not_finite(tensor) is None:
        return ""
    rows = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
    numbers = rows.nonzero().flatten().tolist()
    rest = f" and {len(numbers) - _MOST_NAMES} more" if len(numbers) > _MOST_NAMES else ""
    return f", samples {', '.join(map(str, numbers[:_MOST_NAMES]))}{rest}"


@contextmanager
def _alone(trainer: Trainer) -> Iterator[None]:
    """Compute without the other ranks, which may have no reason to."""
    strategy = trainer.strategy
    wrapped = strategy.model
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
    try:
        yield
    finally:
        if strategy.model is not wrapped:
            strategy.model = wrapped
