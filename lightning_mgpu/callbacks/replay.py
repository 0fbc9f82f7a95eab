"""Compute the step of a bundle again, on one device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from lightning_mgpu._compat.lightning import Callback, LightningModule, Trainer
from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.lightning_restart import go_to_step
from lightning_mgpu.callbacks.non_finite import NonFiniteGuard
from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.engine.random_state import RandomState
from lightning_mgpu.errors import NonFiniteError


@dataclass(frozen=True)
class Replayed:
    """Outcome of a replay.

    Attributes:
        then: What was told when the bundle was written.
        now: What is found now; `None` if the step is finite.
        differs: How the step differs from the one of the run; empty if in nothing.
    """

    then: str
    now: str | None
    differs: str


def replay(bundle: dict[str, Any], model: LightningModule, accelerator: str = "auto") -> Replayed:
    """Compute the step of a bundle again, on one device.

    Args:
        bundle: From `load_bundle`.
        model: Its module, from `model_of`.
        accelerator: As of the Trainer.
    """
    # The batch has been through these hooks.
    hooks = ["on_before_batch_transfer"]
    if not bundle["splits"]:
        hooks.append("on_after_batch_transfer")
    vars(model).update(dict.fromkeys(hooks, _unchanged))
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=bundle["precision"],
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Reinstate(bundle), NonFiniteGuard(bundle=False)],
    )
    now = None
    try:
        trainer.fit(model, _OneBatch(bundle["args"][0]))
    except NonFiniteError as error:
        now = error.words
    return Replayed(bundle["words"], now, _differences(bundle))


class _OneBatch:
    """Loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self._batch])


class _Reinstate(Callback):
    """Puts the step's states in place just before it is computed."""

    def __init__(self, bundle: dict[str, Any]) -> None:
        self._bundle = bundle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        bundle, strategy = self._bundle, trainer.strategy
        own, buffers = strategy.training_step, bundle["buffers"]

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                for name, buffer in pl_module.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])
            RandomState.of(bundle["random"]).restore()
            others = map_leaves(_on(strategy.root_device), (bundle["args"][1:], bundle["kwargs"]))
            return own(*args[:1], *others[0], **others[1])

        assign(strategy, "training_step", training_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        go_to_step(trainer, self._bundle["epoch"], self._bundle["step"])


def _on(device: torch.device) -> Any:
    return lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf


def _unchanged(batch: Any, *_: Any, **__: Any) -> Any:
    return batch


def _differences(bundle: dict[str, Any]) -> str:
    if bundle["streams"] is None:
        return ""
    return (
        f"`{bundle['strategy']}` has computed the batch in parts with random numbers of their own;"
        " here it is computed whole, and what draws random numbers draws others."
    )
