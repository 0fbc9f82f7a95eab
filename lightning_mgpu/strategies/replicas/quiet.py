"""Read-only Trainer for a LightningModule in a trial run."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_mgpu.engine.data_parallel.copying.isolation import UnsafeError
from lightning_mgpu.engine.data_parallel.copying.sandbox import Sandbox
from lightning_mgpu.strategies.replicas.log_merging import LogRecorder

_REFUSED = frozenset({"step", "zero_grad", "load_state_dict", "save_checkpoint", "toggle_model"})
_REFUSED_METHODS = ("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")


def silence(sandbox: Sandbox, recorder: LogRecorder) -> None:
    """Keep logging, printing and Trainer calls of a sandbox's step from the real objects."""
    root: Any = sandbox.module
    trainer = QuietTrainer(root.trainer, root)
    for module in sandbox.modules:
        if not isinstance(module, LightningModule):
            continue
        state = vars(module)
        state["_trainer"] = trainer
        state["log"] = recorder.log
        state["print"] = _nothing
        state["optimizers"] = _Reads(type(module).optimizers, module)
        state["lr_schedulers"] = _Reads(type(module).lr_schedulers, module)
        state.update({name: _refused(name) for name in _REFUSED_METHODS})


class QuietTrainer:
    """Trainer that reads from another, keeps writes to itself, and has loggers that do nothing.

    Args:
        trainer: The Trainer.
        module: Stands for the Trainer's LightningModule.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        loggers = [DummyLogger() for _ in trainer.loggers]
        vars(self).update(
            _real=trainer,
            lightning_module=module,
            model=module,
            loggers=loggers,
            logger=loggers[0] if loggers else None,
        )

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Trainer

    def __getattr__(self, name: str) -> Any:
        return _refused(name) if name in _REFUSED else getattr(vars(self)["_real"], name)


class ReadOnly:
    """An optimizer or scheduler that refuses to step."""

    def __init__(self, real: Any) -> None:
        vars(self)["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return _refused(name) if name in _REFUSED else getattr(vars(self)["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafeError(f"it sets `{name}` of an optimizer or scheduler")


class _Reads:
    """Replacement for `LightningModule.optimizers` and `lr_schedulers`."""

    def __init__(self, method: Any, module: Any) -> None:
        self._method, self._module = method, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._method(self._module, *args, **kwargs)
        if isinstance(found, (list, tuple)):
            return [ReadOnly(each) for each in found]
        return None if found is None else ReadOnly(found)


def _refused(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsafeError(f"it calls `{name}`")

    return refuse


def _nothing(*_: Any, **__: Any) -> None:
    """Neither print nor log."""
