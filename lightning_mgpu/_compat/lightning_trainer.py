"""What we need of a Trainer's connectors and of its private methods."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning import (
    LearningRateFinder,
    TrainerStatus,
    _call_teardown_hook,
    _determine_lr_attr_name,
)
from lightning_mgpu._compat.lightning_attributes import assign

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Callback, LightningModule, Trainer

_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def checkpoint_of(trainer: "Trainer") -> dict[str, Any]:
    """A whole checkpoint, as `save_checkpoint` would write it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def restore_model_and_callbacks(trainer: "Trainer", path: Path) -> None:
    """Load a checkpoint of our own as far as the Trainer does before `on_fit_start`.

    Lightning restores what is left, loops and optimizers, right after that hook.
    """
    trainer._checkpoint_connector._restore_modules_and_callbacks(path, weights_only=False)


def resumed_from(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the function that fits, changed so that it starts from a checkpoint of ours."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    if unknown := {"ckpt_path", "weights_only"} - bound.signature.parameters.keys():
        raise TypeError(f"`{function.__qualname__}` takes no {' and no '.join(sorted(unknown))}.")
    bound.arguments.update(ckpt_path=path, weights_only=False)
    return bound.args, bound.kwargs


def signal_handlers_before(trainer: "Trainer") -> Mapping[int, Any]:
    """The program's own signal handlers, by signal, while the Trainer has put in its own."""
    return trainer._signal_connector._original_handlers


def restore_signal_handlers(trainer: "Trainer") -> None:
    """Put the program's own signal handlers back."""
    trainer._signal_connector.teardown()


def logged_values(trainer: "Trainer") -> dict[str, dict[str, Any]]:
    """The Trainer's dictionaries of logged values, for `set_logged_values` on another one."""
    return {name: getattr(trainer._logger_connector, name) for name in _METRICS}


def set_logged_values(trainer: "Trainer", values: Mapping[str, dict[str, Any]]) -> None:
    """Give the Trainer the logged values of another one."""
    for name, dictionary in values.items():
        assign(trainer._logger_connector, name, dictionary)


def hook_owner(trainer: "Trainer", hook: str) -> Any:
    """The module or DataModule whose method of that name transfers batches."""
    selector = trainer._data_connector._datahook_selector
    assert selector is not None
    return selector.get_instance(hook)


def around_prepare_data(trainer: "Trainer", wrap: Callable[[Callable[[], None]], None]) -> None:
    """Have the next call of the `prepare_data` hooks go through `wrap`, once."""
    connector: Any = trainer._data_connector
    original: Callable[[], None] = connector.prepare_data

    def prepare_data() -> None:
        del connector.prepare_data
        wrap(original)

    connector.prepare_data = prepare_data


def end_search(trainer: "Trainer") -> None:
    """What Lightning does where the `Tuner` stops a run that was for a search only."""
    _call_teardown_hook(trainer)
    trainer._teardown()
    trainer.state.status, trainer.state.stage = TrainerStatus.FINISHED, None


def begin_again(trainer: "Trainer") -> None:
    """Make a Trainer whose `fit` has failed ready for its function that fits, as `fit` does."""
    trainer._teardown()
    trainer.state.status, trainer.training, trainer.should_stop = TrainerStatus.RUNNING, True, False


def attribute_of_found_rate(callback: "Callback", model: "LightningModule") -> str | None:
    """The model's attribute to which a search has set the learning rate; `None` without one."""
    if not isinstance(callback, LearningRateFinder) or not callback._update_attr:
        return None
    if callback.optimal_lr is None:
        return None
    return _determine_lr_attr_name(model, callback._attr_name)
