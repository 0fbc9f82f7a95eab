"""Transfer the state of rank 0's Trainer to the driver's after a run."""

import contextvars
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning.pytorch.tuner.lr_finder import _determine_lr_attr_name
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr

from lightning_mgpu._compat.torch_pickling import pickle_module
from lightning_mgpu.launch.pickler import Pickler
from lightning_mgpu.ray import loggers
from lightning_mgpu.ray.gathered_state import GatheredState, plain_name, tensors_of
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


@dataclass(frozen=True)
class RunState:
    """State of rank 0's Trainer after a run.

    Attributes:
        result: What the trainer's function returned.
        state: `trainer.state`.
        should_stop: `trainer.should_stop`.
        metrics: The dictionaries of logged values, by attribute.
        loops: The loops' progress, by attribute.
        batches: How many training batches an epoch has.
        callbacks: Pickled attributes of each callback that the driver had sent, or its own
            `state_dict` where those cannot be pickled.
        loggers: Pickled attributes of each logger.
        found: Attributes of the model that a search has set, by name.
        optimizers: Pickled optimizers and schedulers; `None` if there are none to return.
        precision: State of the precision plugin.
        whole: The model's tensors, and what the pickled optimizers lack.
    """

    result: Any
    state: TrainerState
    should_stop: bool
    metrics: dict[str, dict[str, Any]]
    loops: dict[str, dict[str, Any]]
    batches: int | float
    callbacks: list[bytes | dict[str, Any]]
    loggers: list[dict[str, bytes]]
    found: dict[str, Any]
    optimizers: bytes | None
    precision: dict[str, Any]
    whole: GatheredState

    @classmethod
    def of(
        cls, trainer: "Trainer", result: Any, callbacks: "Iterable[Callback]", whole: GatheredState
    ) -> "RunState":
        """Take the state when a run of `trainer` has just returned `result`.

        Args:
            trainer: Rank 0's.
            result: What the run returned.
            callbacks: Those that the driver knows, in its order.
            whole: The model's tensors, gathered by all ranks.
        """
        here = own_objects(trainer, callbacks)
        names = {id(obj): name for name, obj in here.items()}
        fitted = trainer.state.fn == TrainerFn.FITTING
        return cls(
            result=result,
            state=trainer.state,
            should_stop=trainer.should_stop,
            metrics={name: getattr(trainer._logger_connector, name) for name in _METRICS},
            loops={name: getattr(trainer, name).state_dict() for name in _LOOPS},
            batches=trainer.fit_loop.max_batches,
            callbacks=[_callback_state(callback, names) for callback in callbacks],
            loggers=loggers.states(trainer.loggers, partial(dump, names=names)),
            found=_found(trainer, callbacks),
            optimizers=_optimizers(trainer, names, whole) if fitted else None,
            precision=trainer.precision_plugin.state_dict(),
            whole=whole,
        )

    def large_tensors(self) -> list[torch.Tensor]:
        """Tensors that need not be pickled."""
        return list((self.whole.weights or {}).values())

    def restore(self, trainer: "Trainer") -> Any:
        """Give the driver's `trainer` the state of rank 0's; return the run's result."""
        model = trainer.lightning_module
        callbacks = callbacks_of(trainer)
        trainer.strategy.connect(model)
        model.trainer = trainer
        if self.whole.weights is not None:
            _load_weights(model, self.whole.weights)
        here = own_objects(trainer, callbacks)
        for callback, state in zip(callbacks, self.callbacks, strict=True):
            if isinstance(state, bytes):
                vars(callback).update(load(state, here))
            elif state:
                callback.load_state_dict(state)
        for logger, attributes in zip(trainer.loggers, self.loggers, strict=True):
            loggers.restore(logger, attributes, partial(load, here=here))
        for name, value in self.found.items():
            lightning_setattr(model, name, value)
        if self.optimizers is not None:
            optimizers, schedulers = load(self.optimizers, here)
            _load_states(model, optimizers, self.whole)
            trainer.strategy.optimizers = optimizers
            trainer.strategy.lr_scheduler_configs = schedulers
        trainer.precision_plugin.load_state_dict(self.precision)
        for name, progress in self.loops.items():
            loop = getattr(trainer, name)
            loop.load_state_dict(progress)
            _forget_restart(loop)
        trainer.fit_loop.max_batches = self.batches
        trainer.fit_loop._combined_loader_states_to_load = []
        for name, values in self.metrics.items():
            setattr(trainer._logger_connector, name, values)
        trainer.should_stop = self.should_stop
        vars(trainer.state).update(vars(self.state))
        return self.result


def weights_of(trainer: "Trainer") -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the trainer's model."""
    tensors = tensors_of(trainer.lightning_module)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    tensors = tensors_of(model)
    if tensors.keys() != weights.keys():
        added = sorted(weights.keys() - tensors.keys()) or sorted(tensors.keys() - weights.keys())
        raise RuntimeError(
            f"`{type(model).__name__}` has other parameters on the workers than here ({added[0]},"
            " ...), so they cannot be returned. Create every layer in `__init__`, or in"
            " `configure_model` and call that before the Trainer."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])


def _load_states(
    model: torch.nn.Module, optimizers: "list[Optimizer]", whole: GatheredState
) -> None:
    """Load the states of optimizers that were sent without."""
    tensors = tensors_of(model)
    for optimizer, states in zip(optimizers, whole.optimizer_states or (), strict=False):
        for name, state in states.items():
            optimizer.state[tensors[name]] = state


def _forget_restart(loop: _Loop) -> None:
    """Undo what `load_state_dict` concludes: the next run starts anew instead of resuming."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _forget_restart(child)


def _callback_state(callback: "Callback", names: dict[int, str]) -> bytes | dict[str, Any]:
    try:
        return dump(vars(callback), names)
    except Exception as error:
        log.debug("%s: only its state_dict is returned (%s).", type(callback).__name__, error)
        return callback.state_dict()


def _found(trainer: "Trainer", callbacks: "Iterable[Callback]") -> dict[str, Any]:
    """Attributes set by Lightning's learning rate search, for the user to read."""
    model, found = trainer.lightning_module, {}
    for callback in callbacks:
        if not isinstance(callback, LearningRateFinder) or not callback._update_attr:
            continue
        if callback.optimal_lr is not None:
            name = _determine_lr_attr_name(model, callback._attr_name)
            found[name] = lightning_getattr(model, name)
    return found


def _optimizers(trainer: "Trainer", names: dict[int, str], whole: GatheredState) -> bytes | None:
    optimizers: list[Optimizer] = trainer.strategy.optimizers
    if whole.optimizer_states is not None:
        for optimizer in optimizers:
            optimizer.state.clear()  # a part only, and it has been gathered
    try:
        return dump((optimizers, trainer.strategy.lr_scheduler_configs), names)
    except Exception as error:
        log.warning("The optimizers stay on the workers, since they cannot be pickled: %s", error)
        return None


def own_objects(trainer: "Trainer", callbacks: "Iterable[Callback]") -> dict[str, Any]:
    """Objects that both sides have, by name; references to them are kept, not pickled."""
    model = trainer.lightning_module
    modules = model.named_modules()
    objects: dict[str, Any] = {f"module {plain_name(name)}": module for name, module in modules}
    objects |= {f"tensor {name}": tensor for name, tensor in tensors_of(model).items()}
    objects |= {f"callback {index}": callback for index, callback in enumerate(callbacks)}
    objects |= {f"logger {index}": logger for index, logger in enumerate(trainer.loggers)}
    objects |= {"trainer": trainer, "strategy": trainer.strategy}
    datamodule = getattr(trainer, "datamodule", None)
    return objects if datamodule is None else {**objects, "datamodule": datamodule}


_here: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("_here")


def _own(name: str) -> Any:
    return _here.get().get(name)


def dump(obj: Any, names: dict[int, str]) -> bytes:
    """Pickle `obj`, with references by name to the objects in `names`."""

    class References(Pickler):
        def reducer_override(self, part: Any) -> Any:
            name = names.get(id(part))
            return super().reducer_override(part) if name is None else (_own, (name,))

    stream = io.BytesIO()
    torch.save(obj, stream, pickle_module(References), 5)
    return stream.getvalue()


def load(data: bytes, here: dict[str, Any]) -> Any:
    """Unpickle the data of `dump`, with the objects in `here` for the references."""
    token = _here.set(here)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    finally:
        _here.reset(token)
