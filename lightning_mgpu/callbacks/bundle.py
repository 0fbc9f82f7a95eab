"""A file with all that a training step starts from."""

import io
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import cloudpickle
import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import LightningModule, Trainer
from lightning_mgpu._compat.namespace import describe
from lightning_mgpu.callbacks.step_record import StepRecord
from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.strategies.data_parallel import DataParallelStrategy

log = logging.getLogger(__name__)

FORMAT = 1


def save_bundle(path: Path, trainer: Trainer, record: StepRecord, facts: dict[str, Any]) -> bool:
    """Write a bundle, all of it or nothing.

    Args:
        path: Where to.
        trainer: Between backward and the optimizer's step, so that weights are as before.
        record: Of the step.
        facts: What else is to be known of it: numbers and words.

    Returns:
        Whether it was written; otherwise a warning says why not.
    """
    model, part = trainer.lightning_module, path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        bundle = {
            "format": FORMAT,
            **facts,
            "strategy": type(trainer.strategy).__name__,
            "splits": isinstance(trainer.strategy, DataParallelStrategy),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            **_model(model),
            "buffers": {name: buffer.cpu() for name, buffer in record.buffers.items()},
            "args": _on_host(record.args),
            "kwargs": _on_host(record.kwargs),
            "random": record.random.plain(),
            "streams": record.streams,
        }
        torch.save(bundle, part, pickle_module=cloudpickle)
        os.replace(part, path)
    except Exception as error:  # a full disk, a batch that does not pickle: training has an error
        with suppress(OSError):  # of its own to tell
            part.unlink(missing_ok=True)
        log.warning(
            "The step could not be saved in %s (%s: %s).", path, type(error).__name__, error
        )
        return False
    return True


def load_bundle(path: Path) -> dict[str, Any]:
    """Read a bundle, which may hold objects of any class, as a checkpoint of one's own.

    Raises:
        ValueError: It is none, or needs a module that cannot be imported.
    """
    with open(path, "rb") as file:
        bundle = _loaded(file)
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise ValueError("it was not written by `NonFiniteGuard`, or by another version of it")
    return bundle


def model_of(bundle: dict[str, Any]) -> LightningModule:
    """The module of a bundle, with the weights from before the step.

    Raises:
        ValueError: Neither could the module be pickled, nor its hyperparameters be saved.
    """
    if bundle["pickled"] is not None:
        model: LightningModule = _loaded(io.BytesIO(bundle["pickled"]))
        if not isinstance(model, LightningModule):
            raise ValueError(
                f"its model, a `{type(model).__name__}`, is not for the Trainer of {describe()}"
            )
        return model
    try:
        model = bundle["class"](**bundle["hparams"])
    except TypeError as error:
        raise ValueError(
            f"its model could not be pickled ({bundle['why_not']}) and cannot be built from its"
            f" saved hyperparameters ({error}): call `self.save_hyperparameters()` in its"
            " `__init__`"
        ) from error
    model.load_state_dict(bundle["state_dict"])
    return model


def _loaded(file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever unpickling objects of any class runs into
        raise ValueError(f"it does not load ({type(error).__name__}: {error})") from error


def _model(model: LightningModule) -> dict[str, Any]:
    stream = io.BytesIO()
    try:
        torch.save(model, stream, pickle_module=cloudpickle)
    except Exception as error:
        return {
            "pickled": None,
            "why_not": f"{type(error).__name__}: {error}",
            "class": type(model),
            "hparams": dict(model.hparams),
            "state_dict": _on_host(dict(model.state_dict())),
        }
    return {"pickled": stream.getvalue()}


def _on_host(value: Any) -> Any:
    return map_leaves(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)
