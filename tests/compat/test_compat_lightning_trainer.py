"""What `_compat` does to a Trainer and its loops has the effect that we need."""

import inspect
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import Calls, Model, Validated, quiet

import lightning_mgpu._compat.lightning as names
from lightning_mgpu._compat import (
    lightning_loops,
    lightning_module,
    lightning_results,
    lightning_trainer,
)
from lightning_mgpu._compat.lightning import (
    LearningRateFinder,
    ModelCheckpoint,
    Trainer,
)


def test_trainer_state_in_the_middle_of_training() -> None:
    seen: dict[str, Any] = {}

    def look(trainer: Trainer) -> None:
        if seen:
            return
        seen["checkpoint"] = lightning_trainer.checkpoint_of(trainer)
        seen["handlers"] = dict(lightning_trainer.signal_handlers_before(trainer))
        seen["owner"] = lightning_trainer.hook_owner(trainer, "transfer_batch_to_device")
        seen["trained"] = lightning_loops.is_epoch_trained(trainer)
        seen["optimizers"] = lightning_module.lightning_optimizers(trainer.strategy)

    model = Model()
    trainer = quiet(Calls(on_train_batch_start=look))
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(model)
    assert seen["checkpoint"]["state_dict"].keys() == model.state_dict().keys()
    assert seen["checkpoint"]["optimizer_states"]
    assert seen["handlers"][signal.SIGTERM] is before
    assert seen["owner"] is model
    assert not seen["trained"]
    (optimizer,) = seen["optimizers"]
    assert isinstance(optimizer.optimizer, torch.optim.SGD)
    assert lightning_loops.is_epoch_trained(trainer)


def test_signal_handlers_come_back_early() -> None:
    handlers = []

    def restore(trainer: Trainer) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        lightning_trainer.restore_signal_handlers(trainer)
        handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    quiet(Calls(on_train_start=restore)).fit(Model())
    assert handlers[0] is not before
    assert handlers[1] is before


def test_logged_values_go_to_another_trainer() -> None:
    first, second = quiet(), quiet()
    first.fit(Model())
    lightning_trainer.set_logged_values(second, lightning_trainer.logged_values(first))
    assert second.callback_metrics["loss"] == first.callback_metrics["loss"]
    assert second.logged_metrics.keys() == first.logged_metrics.keys() == {"loss"}
    assert second.progress_bar_metrics == {}


def test_a_checkpoint_is_given_to_the_function_that_fits() -> None:
    given: list[Any] = []

    class Launcher(names._Launcher):
        is_interactive_compatible = True

        def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
            args, kwargs = lightning_trainer.resumed_from(function, args, kwargs, "path.ckpt")
            bound = inspect.signature(function).bind(*args, **kwargs)
            given.append({k: v for k, v in bound.arguments.items() if v is not None})

        def kill(self, signum: int) -> None: ...

    model, trainer = Model(), quiet()
    trainer.strategy._launcher = Launcher()
    trainer.fit(model)
    assert given == [{"model": model, "ckpt_path": "path.ckpt", "weights_only": False}]


def test_a_function_that_takes_no_checkpoint_is_refused() -> None:
    def fit(model: Any, ckpt_path: Any = None) -> None: ...

    with pytest.raises(TypeError, match="takes no weights_only"):
        lightning_trainer.resumed_from(fit, ("model",), {}, "path.ckpt")


def test_a_checkpoint_of_ours_is_restored_in_a_hook(tmp_path: Path) -> None:
    saved, model = Model(), Model()
    first = quiet()
    first.fit(saved)
    first.save_checkpoint(tmp_path / "saved.ckpt")
    weights = []

    def restore(trainer: Trainer) -> None:
        lightning_trainer.restore_model_and_callbacks(trainer, tmp_path / "saved.ckpt")
        weights.append(model.layer.weight.detach().clone())

    second = quiet(Calls(on_fit_start=restore), max_epochs=2)
    second.fit(model)
    assert torch.equal(weights[0], saved.layer.weight)
    assert second.global_step == 4  # loops and optimizers went on, too: 2 steps before, 2 here


def test_prepare_data_is_wrapped_once() -> None:
    calls = []

    class Prepared(Model):
        def prepare_data(self) -> None:
            calls.append("prepared")

    def wrap(original: Callable[[], None]) -> None:
        calls.append("before")
        original()
        calls.append("after")

    trainer = quiet()
    lightning_trainer.around_prepare_data(trainer, wrap)
    trainer.fit(Prepared())
    trainer.fit(Prepared())
    assert calls == ["before", "prepared", "after", "prepared"]


def test_a_search_is_ended_as_lightning_ends_it() -> None:
    torn_down = []
    trainer = quiet(Calls(teardown=lambda trainer: torn_down.append(trainer.state.status)))

    def stop(trainer: Trainer) -> None:
        trainer.strategy._launcher = None
        lightning_trainer.end_search(trainer)
        torn_down.append(trainer.state.status)
        raise names._TunerExitException

    trainer.callbacks.insert(0, Calls(on_train_start=stop))
    trainer.fit(Model())
    assert [status.value for status in torn_down] == ["running", "finished", "finished"]


@pytest.mark.parametrize("update_attr", [False, True])
def test_the_attribute_of_a_learning_rate_search(update_attr: bool) -> None:
    model = Model()
    finder = LearningRateFinder(num_training_steps=5, update_attr=update_attr)
    name = lightning_trainer.attribute_of_found_rate
    assert name(finder, model) is None
    trainer = quiet(finder, max_steps=5, max_epochs=-1)
    trainer.fit(model)
    assert name(finder, model) == ("lr" if update_attr and finder.optimal_lr else None)
    assert name(ModelCheckpoint(), model) is None


def test_live_state_is_set_aside_and_comes_back() -> None:
    trainer = quiet()
    trainer.fit(Model())
    trainer.predict(trainer.model)
    loops = (trainer.fit_loop, trainer.predict_loop)
    loaders = [loop._combined_loader for loop in loops]
    predictions = trainer.predict_loop._predictions
    assert any(loader is not None for loader in loaders)
    with ExitStack() as stack:
        lightning_loops.set_live_state_aside(trainer, stack)
        assert trainer.strategy.optimizers == []
        assert [loop._combined_loader for loop in loops] == [None, None]
    assert [loop._combined_loader for loop in loops] == loaders
    assert trainer.predict_loop._predictions is predictions


def test_progress_is_told_in_all_stages() -> None:
    told = {}
    trainer = quiet(
        Calls(
            setup=lambda t: told.update(setup=lightning_loops.progress_of(t)),
            on_train_batch_end=lambda t: told.update(fit=lightning_loops.progress_of(t)),
            on_validation_batch_end=lambda t: told.update(validate=lightning_loops.progress_of(t)),
            on_predict_batch_end=lambda t: told.update(predict=lightning_loops.progress_of(t)),
        ),
        max_steps=2,
    )
    assert lightning_loops.progress_of(trainer) == {"stage": "setup"}
    trainer.fit(Validated())
    assert told["setup"]["stage"] in ("setup", "train", "fit")
    assert told["fit"] == {
        **{"stage": "train", "epoch": 0, "global step": 2, "batches begun": 2},
        "logged": "training_step.loss",
    }
    assert told["validate"]["stage"] == "validate"
    assert told["validate"]["logged"] == "validation_step.val_loss"
    trainer.predict(Model())
    assert told["predict"]["batches begun"] == 2


def test_names_that_are_averaged_over_the_ranks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    group = object()

    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("ours", 1.0, sync_dist=True)
            self.log("first", 1.0, sync_dist=True, rank_zero_only=True)
            self.log("of a group", 1.0, sync_dist=True, sync_dist_group=group)
            return super().training_step(batch, batch_idx)

    def spread(trainer: Trainer) -> None:  # or Lightning forgets what is to be averaged
        monkeypatch.setattr(type(trainer._accelerator_connector), "is_distributed", True)

    def tell(trainer: Trainer) -> None:
        told.append(lightning_results.synced_names(trainer))

    told: list[list[str]] = []
    quiet(Calls(on_train_start=spread, on_train_batch_end=tell)).fit(Logging())
    assert told[0] == ["training_step.ours"]


def test_loaders_of_a_prediction() -> None:
    trainer = quiet()
    assert lightning_loops.predict_loaders(trainer) == []
    trainer.predict(Model())
    assert [len(loader) for loader in lightning_loops.predict_loaders(trainer)] == [2]


def test_a_run_after_restored_loops_starts_anew() -> None:
    first, second = quiet(), quiet(max_epochs=2)
    first.fit(Model())
    second.fit_loop.load_state_dict(first.fit_loop.state_dict())
    assert second.fit_loop.is_resuming
    lightning_loops.forget_restart(second.fit_loop)
    lightning_loops.forget_loader_states(second)
    assert not second.fit_loop.is_resuming
    assert not second.fit_loop.epoch_loop.is_resuming
    assert second.fit_loop._combined_loader_states_to_load == []
    began = []
    second.callbacks.append(Calls(on_train_epoch_start=lambda t: began.append(t.current_epoch)))
    second.fit(Model())
    assert began == [1]
