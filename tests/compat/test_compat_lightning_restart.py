"""What `_compat` does to a fit loop, its loader and its results has the effect that we need."""

from typing import Any

import torch
from lightning_models import Calls, Model, Validated, quiet
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu._compat import lightning_loaders, lightning_restart, lightning_results
from lightning_mgpu._compat.lightning import Callback, CombinedLoader, Trainer


def test_loader_is_asked_for_through_us() -> None:
    made: list[CombinedLoader] = []

    def wrap(loaders: Any, mode: str) -> CombinedLoader:
        assert mode == "max_size_cycle"
        made.append(CombinedLoader(loaders, mode))
        return made[-1]

    undo: list[Any] = []
    trainer = quiet()
    undo.append(lightning_loaders.wrap_train_loader(trainer, wrap))
    trainer.fit(Model())
    assert trainer.fit_loop._combined_loader is made[0]
    undo[0]()
    trainer.fit(Model())
    assert len(made) == 1


def test_postponed_loader_knows_its_length() -> None:
    class Fails(DataLoader[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("started")

    loader = CombinedLoader(Fails(TensorDataset(torch.ones(4, 2)), batch_size=2), "min_size")
    lightning_loaders.postpone(loader)
    assert len(loader) == 2


def test_places_in_a_run() -> None:
    seen: dict[str, dict[str, Any]] = {}

    def look(where: str) -> Any:
        def note(trainer: Trainer) -> None:
            seen.setdefault(where, {}).update(
                trained=lightning_restart.batches_trained(trainer),
                begun=lightning_restart.batches_begun(trainer),
                within=lightning_restart.is_within_batch(trainer),
                batch_end=lightning_restart.is_at_batch_end(trainer),
                epoch_start=lightning_restart.is_at_epoch_start(trainer),
                epoch_end=lightning_restart.is_at_epoch_end(trainer),
                last=lightning_restart.is_last_batch(trainer),
                validates=lightning_restart.is_validation_due(trainer),
                accumulates=lightning_restart.is_accumulating(trainer),
            )

        return note

    names = (
        *("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end"),
        *("on_validation_end", "on_train_epoch_end"),
    )
    trainer = quiet(Calls(**{name: look(name) for name in names}), num_sanity_val_steps=0)
    trainer.fit(Validated())

    def true(where: str) -> set[str]:
        return {name for name, value in seen[where].items() if value}

    assert true("on_train_epoch_start") - {"validates"} == {"epoch_start"}
    assert true("on_train_batch_start") == {"trained", "begun", "within", "last", "validates"}
    assert true("on_train_batch_end") == {"trained", "batch_end", "last", "validates"}
    assert true("on_validation_end") == {"trained", "last", "validates"}
    assert true("on_train_epoch_end") == {"trained", "epoch_end", "last", "validates"}


def test_logged_values_go_on() -> None:
    known: list[Any] = []
    sums: list[float] = []

    def exchange(trainer: Trainer) -> None:
        if not known:
            known.append(lightning_results.logged_so_far(trainer))
            (entry,) = known[0]["results"]
            entry["parts"]["value"] += 3.0
            trainer.fit_loop.epoch_loop._results.clear()
            lightning_results.go_on_logging(trainer, known[0])
        sums.append(float(trainer.fit_loop.epoch_loop._results["training_step.loss"].value))

    class Mean(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", torch.tensor(1.0), on_step=False, on_epoch=True, batch_size=1)
            return self.layer(batch[0]).mean()

    trainer = quiet(Calls(on_train_batch_end=exchange))
    trainer.fit(Mean())
    assert sums == [4.0, 5.0]
    assert float(trainer.callback_metrics["loss"]) == 2.5
    assert lightning_results.metrics_to_reset(trainer, True) == set()
    lightning_results.set_callback_metrics(trainer, {"other": torch.tensor(1.0)})
    assert set(lightning_results.callback_metrics(trainer)) == {"loss", "other"}


def test_trainer_says_that_it_is_at_another_step() -> None:
    seen: list[tuple[int, int]] = []

    class Moves(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            lightning_restart.go_to_step(trainer, 4, 70)

        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            seen.append((trainer.current_epoch, trainer.global_step))

    quiet(Moves(), limit_train_batches=2).fit(Model())
    assert seen == [(4, 70), (4, 71)]
