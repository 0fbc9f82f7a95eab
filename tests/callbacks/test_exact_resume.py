"""A run that goes on from any checkpoint ends with the bits of one that was never interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boring
import cloudpickle
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from resuming import Augmented, Endless, Net, Result, Saver, fit, loader
from torch.utils.data import DataLoader

from lightning_mgpu.callbacks import ExactResume


def pair(mode: Any, **kwargs: Any) -> CombinedLoader:
    return CombinedLoader({"a": loader(), "b": loader(batch_size=8, **kwargs)}, mode)


def with_own_generator() -> Any:
    return loader(generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "accumulation": (loader, {"accumulate_grad_batches": 4}),
    "validation within": (loader, {"val_check_interval": 3}),
    "validation every other epoch": (loader, {"check_val_every_n_epoch": 2}),
    "no validation": (loader, {"validation": False}),
    "steps": (loader, {"max_epochs": -1, "max_steps": 15}),
    "plateau": (loader, {"model": {"plateau": True}}),
    "manual": (loader, {"model": {"manual": True}}),
    "own generator": (with_own_generator, {}),
    "no length": (lambda: DataLoader(Endless(), batch_size=4), {"model": {"draws": False}}),
    "two loaders": (lambda: pair("min_size"), {"validation": False}),
    "limited": (loader, {"limit_train_batches": 4}),
    "stopped early": (
        loader,
        {"others": lambda: [EarlyStopping("val_loss", min_delta=9)], "max_epochs": 9},
    ),
    "accumulation that changes": (
        loader,
        {"others": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]},
    ),
    "moving average": (loader, {"others": lambda: [EMAWeightAveraging()]}),
    "dp": (loader, {"strategy": "dp", "devices": 2}),
    "pipeline": (loader, {"strategy": "pipeline", "devices": 2}),
}


def test_from_every_checkpoint(tmp_path: Path) -> None:
    whole = Saver(tmp_path)
    expected = fit(loader, whole)
    assert expected.digest == fit(loader, Saver(), exact=False).digest
    assert len(whole.saved) == 3 * (1 + 6 + 1 + 1)
    for path in whole.saved:
        fit(loader, Saver(), path).assert_continues(expected, path.name)


@pytest.mark.parametrize("name", CASES)
def test_from_a_checkpoint_of_the_second_epoch(name: str, tmp_path: Path) -> None:
    loaders, kwargs = CASES[name]
    whole = Saver(tmp_path)
    expected = fit(loaders, whole, **kwargs)
    third = len(whole.saved) // 3
    for path in whole.saved[third : 2 * third]:
        fit(loaders, Saver(), path, **kwargs).assert_continues(expected, path.name)


@pytest.mark.parametrize(
    "strategy", ["mgpu_ddp", pytest.param("pipeline_ddp", marks=pytest.mark.slow)]
)
def test_ranks_go_on_each_from_its_own_state(strategy: str, tmp_path: Path) -> None:
    kwargs = {"strategy": strategy, "devices": 2 if strategy == "mgpu_ddp" else 4}
    whole = Saver(tmp_path)
    expected = fit(loader, whole, **kwargs)
    assert [path.stem for path in whole.saved[7:9]] == ["007-batch", "008-batch"]
    for path in (whole.saved[1], whole.saved[8]):
        fit(loader, Saver(), path, **kwargs).assert_continues(expected, path.name)


@pytest.mark.slow
def test_batches_of_worker_processes(tmp_path: Path) -> None:
    whole = Saver(tmp_path)
    expected = fit(lambda: loader(num_workers=2), whole)
    for path in whole.saved[2::7]:
        got = fit(lambda: loader(num_workers=2), Saver(), path)
        got.assert_continues(expected, path.name)


class Counting:
    """A loader that keeps its place itself."""

    def __init__(self) -> None:
        self.at, self.fetched = 0, 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        self.at %= 6
        while self.at < 6:
            self.at += 1
            self.fetched += 1
            yield torch.full((4, 6), self.at, dtype=torch.float64), torch.arange(4) % 3

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_a_loader_that_keeps_its_place_is_not_run_again(tmp_path: Path) -> None:
    whole = Saver(tmp_path)
    expected = fit(Counting, whole)
    for path in whole.saved[10:16]:
        loaders: list[Counting] = []

        def made(loaders: list[Counting] = loaders) -> Counting:
            loaders.append(Counting())
            return loaders[-1]

        fit(made, Saver(), path).assert_continues(expected, path.name)
        assert loaders[0].fetched == 18 - (int(path.stem[:3]) - 3)


def test_stop_that_was_asked_for(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kwargs: dict[str, Any] = {
        "others": lambda: [EarlyStopping("val_loss", min_delta=9, patience=1)],
        "max_epochs": 9,
    }
    whole = Saver(tmp_path)
    expected = fit(loader, whole, **kwargs)
    assert expected.steps < 9 * 6
    assert not warned(recwarn, "had been told to stop")
    for path in whole.saved[-2:]:  # after the last validation, and at the last epoch's end
        got = fit(loader, Saver(), path, **kwargs)
        got.assert_continues(expected, path.name)
    assert warned(recwarn, "had been told to stop")


def test_checkpoint_loads_without_the_callback(tmp_path: Path) -> None:
    whole = Saver(tmp_path)
    fit(loader, whole)
    assert torch.load(whole.saved[4], weights_only=True)["callbacks"]["ExactResume"]
    assert fit(loader, Saver(), whole.saved[4], exact=False).steps == 18


def warned(recwarn: pytest.WarningsRecorder, what: str) -> bool:
    return any(what in str(warning.message) for warning in recwarn)


def test_checkpoint_without_our_state(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = Saver(tmp_path)
    fit(loader, whole, exact=False)
    fit(loader, Saver(), whole.saved[4])
    assert warned(recwarn, "was written without `ExactResume`")


def test_nothing_is_warned_of_that_is_exact(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole = Saver(tmp_path)
    fit(loader, whole)
    fit(loader, Saver(), whole.saved[4])
    assert not warned(recwarn, "resuming from a checkpoint")
    fit(loader, Saver(), whole.saved[4], exact=False)
    assert warned(recwarn, "resuming from a checkpoint")


def test_another_number_of_ranks(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = Saver(tmp_path)
    fit(loader, whole, strategy="mgpu_ddp", devices=2)
    assert not warned(recwarn, "training goes on from it as Lightning does")
    fit(loader, Saver(), whole.saved[4])
    assert warned(recwarn, "was written by 2 ranks, not 1 (resume with 2)")


class Interrupted(Net):
    """Fails in the middle of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 8:
            raise RuntimeError("in the middle")
        return super().training_step(batch, batch_idx)


class SavesOnError(Saver):
    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "error")


@pytest.mark.parametrize("devices", [1, 2])
def test_checkpoint_of_a_failure(
    devices: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It is written at once by whoever writes it, with a warning when it is resumed."""
    kwargs = {"strategy": "auto" if devices == 1 else "mgpu_ddp", "devices": devices}
    saver = SavesOnError(tmp_path)
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(loader, saver, model=Interrupted(), **kwargs)
    assert saver.saved[-1].stem.endswith("error")
    assert fit(loader, Saver(), saver.saved[-1], **kwargs).steps == 18 // devices
    said = "in the middle of a batch" if devices == 1 else "by one of 2 ranks alone"
    assert warned(recwarn, said)


class WithGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(1)


def test_generators_that_nobody_saves(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = Saver(tmp_path)
    fit(with_own_generator, whole, model=WithGenerator(), max_epochs=1)
    assert not warned(recwarn, "are not saved")
    fit(with_own_generator, Saver(), whole.saved[2], model=WithGenerator(), max_epochs=1)
    assert warned(recwarn, "The random generators WithGenerator.numbers are not saved")


class LateHook(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        self.late = True


def test_hook_that_comes_after_checkpoints(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fit(loader, Saver(tmp_path), model=LateHook(), max_epochs=1)
    assert warned(recwarn, "`LateHook.on_train_batch_end` runs after a checkpoint")


def test_loaders_that_cannot_go_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kwargs = {"validation": False}
    whole = Saver(tmp_path)
    fit(lambda: pair("max_size_cycle"), whole, **kwargs)
    assert not warned(recwarn, "begins anew within the epoch")
    fit(lambda: pair("max_size_cycle"), Saver(), whole.saved[4], **kwargs)
    assert warned(recwarn, "begins anew within the epoch")


def test_averaging_that_does_not_save_itself(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    kwargs: dict[str, Any] = {"others": lambda: [StochasticWeightAveraging(0.1)]}
    whole = Saver(tmp_path)
    fit(loader, whole, **kwargs)
    fit(loader, Saver(), whole.saved[8], **kwargs)
    assert warned(recwarn, "`StochasticWeightAveraging` does not save all")


@pytest.mark.slow
def test_workers_that_live_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def loaders() -> Any:
        return loader(num_workers=1, persistent_workers=True)

    whole = Saver(tmp_path)
    fit(loaders, whole, max_epochs=2)
    fit(loaders, Saver(), whole.saved[12], max_epochs=2)
    assert warned(recwarn, "`persistent_workers=True`")


class FailsOnce(pl.Callback):
    """Fails in the second epoch."""

    def __init__(self) -> None:
        self.is_due = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.is_due and trainer.current_epoch == 1:
            self.is_due = False
            raise RuntimeError("in the middle")


def test_trainer_that_has_failed_goes_on(tmp_path: Path) -> None:
    """Wherever the checkpoint was written, and where the error is still being handled."""
    directory = tmp_path / "whole"
    directory.mkdir()
    saver = Saver(directory)
    whole = fit(loader, saver)
    ends = next(n for n, path in enumerate(saver.saved) if path.stem.endswith("epoch"))
    for checkpoint in [saver.saved[0], *saver.saved[2 : ends + 3]]:
        saves, net = Saver(), Net()
        trainer = boring.trainer(
            "auto",
            1,
            callbacks=[FailsOnce(), saves, ExactResume()],
            enable_checkpointing=True,
            max_epochs=3,
        )
        loaders = loader(), DataLoader(Augmented(), batch_size=11)
        try:
            trainer.fit(net, *loaders)
        except RuntimeError:
            saves.epochs.clear()
            trainer.fit(net, *loaders, ckpt_path=checkpoint)
        Result(trainer, net, saves).assert_continues(whole, checkpoint.name)


def test_same_trainer_again(tmp_path: Path) -> None:
    """Nothing of one call is left for the next, nor after a failure."""
    saver, callback = Saver(tmp_path), ExactResume()
    trainer = boring.trainer(
        "auto", 1, callbacks=[saver, callback], enable_checkpointing=True, max_epochs=2
    )
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(Interrupted(), loader())
    assert not {"save_checkpoint", "on_train_start"} & {*vars(trainer.strategy)}
    trainer.fit(Net(), loader())
    trainer.validate(Net(), loader(shuffle=False), verbose=False)
    assert not {"save_checkpoint", "on_train_start"} & {*vars(trainer.strategy)}
    assert trainer.current_epoch == 2


def test_same_trainer_again_on_workers() -> None:
    """What goes to workers is the callback, not the loader of the call before."""
    callback = ExactResume()
    trainer = boring.trainer("mgpu_ddp", 2, callbacks=[callback])
    for _ in range(2):
        loaders = loader(num_workers=1, persistent_workers=True)
        trainer.fit(Net(), loaders)
        assert len(cloudpickle.dumps(callback)) < 1000
    assert trainer.current_epoch == 1
