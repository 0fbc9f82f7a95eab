"""`Trainer.predict` under `DDPStrategy`: what one process returns, whatever the loader."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import boring
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    WeightedRandomSampler,
)

ROWS = [(float(i), f"row {i}") for i in range(23)]


class Order(Sampler[int]):
    def __init__(self, order: Any) -> None:
        self.order = list(order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Growing(BatchSampler):
    """Batches of one sample, two, three, one, ..."""

    def __iter__(self) -> Iterator[list[int]]:
        left = list(self.sampler)
        for size in self._sizes(len(left)):
            yield left[:size]
            left = left[size:]

    def __len__(self) -> int:
        return len(self._sizes(len(self.sampler)))  # type: ignore[arg-type]

    @staticmethod
    def _sizes(total: int) -> list[int]:
        sizes: list[int] = []
        while sum(sizes) < total:
            sizes.append(min(len(sizes) % 3 + 1, total - sum(sizes)))
        return sizes


class Shuffled(Growing):
    """Takes its batches in an order that it draws."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        return iter([batches[i] for i in np.random.permutation(len(batches))])


class MadeBefore(BatchSampler):
    """Makes its batches when it is made itself."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.batches = list(super().__iter__())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Names(pl.LightningModule):
    """Returns each batch as torch's own collation makes it, and its mean with `whole`."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.whole = whole

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        values, names = batch
        return (values * self.weight).mean() if self.whole else (values * self.weight, names)


def _predict(loader: Any, devices: int, whole: bool = False, **kwargs: Any) -> Any:
    """As plain lists; on one device without our strategy."""
    with patch.dict("os.environ"):
        pl.seed_everything(3, verbose=False)
    trainer = boring.trainer("mgpu_ddp" if devices > 1 else "auto", devices, **kwargs)
    return _plain(trainer.predict(Names(whole), loader()))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _batches(kind: Any) -> Callable[[], Any]:
    return lambda: DataLoader(ROWS, batch_sampler=kind(Order(reversed(range(23))), 4, False))  # type: ignore[arg-type]


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(ROWS, 4),  # type: ignore[arg-type]
    "drop last": lambda: DataLoader(ROWS, 4, drop_last=True),  # type: ignore[arg-type]
    "shuffled": lambda: DataLoader(ROWS, 4, shuffle=True),  # type: ignore[arg-type]
    "shuffled, with workers": lambda: DataLoader(ROWS, 4, shuffle=True, num_workers=1),  # type: ignore[arg-type]
    "longest first": lambda: DataLoader(ROWS, 4, sampler=Order(range(22, -1, -1))),  # type: ignore[arg-type]
    "each twice": lambda: DataLoader(ROWS, 4, sampler=Order(i // 2 for i in range(46))),  # type: ignore[arg-type]
    "twice over": lambda: DataLoader(ROWS, 4, sampler=Order([*range(23)] * 2)),  # type: ignore[arg-type]
    "a part": lambda: DataLoader(ROWS, 4, sampler=Order([5, 3, 3, 8])),  # type: ignore[arg-type]
    "drawn": lambda: DataLoader(ROWS, 4, sampler=WeightedRandomSampler([1.0] * 23, 30)),  # type: ignore[arg-type]
    "own batches": _batches(Growing),
    "own batches, drawn": _batches(Shuffled),
    "one large batch": lambda: DataLoader(ROWS, 40),  # type: ignore[arg-type]
    "no batches": lambda: DataLoader(ROWS, batch_size=None, shuffle=True),  # type: ignore[arg-type]
    "several": lambda: [DataLoader(ROWS, 4, shuffle=True), DataLoader(ROWS[:7], 3)],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", LOADERS)
def test_predictions_are_those_of_one_process(name: str, recwarn: pytest.WarningsRecorder) -> None:
    expected = _predict(LOADERS[name], 1)
    for devices in (2, 3):
        assert _predict(LOADERS[name], devices) == expected
    assert not [w for w in recwarn if "predict_step" in str(w.message)]


@pytest.mark.parametrize("name", ["plain", "longest first", "own batches", "several"])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_number_of_batches_is_that_of_all_ranks(name: str, limit: int) -> None:
    expected = _predict(LOADERS[name], 1, limit_predict_batches=limit)
    assert _predict(LOADERS[name], 2, limit_predict_batches=limit) == expected


def test_one_batch_of_one_sample_is_there_for_each_rank() -> None:
    """A rank without a batch would skip all hooks, and those that wait for it would hang."""

    class Meets(Names):
        def on_predict_epoch_end(self) -> None:
            self.trainer.strategy.barrier()

    trainer = boring.trainer(devices=3, fast_dev_run=1)
    loader = DataLoader(ROWS, 1)  # type: ignore[arg-type]
    assert _plain(trainer.predict(Meets(), loader)) == [[[0.0], ["row 0"]]]


def test_a_part_of_the_batches_is_the_first_part() -> None:
    def loader() -> Any:
        return DataLoader(ROWS[:16], 2, sampler=Order(reversed(range(16))))  # type: ignore[arg-type]

    expected = _predict(loader, 1, limit_predict_batches=0.5)
    assert _predict(loader, 2, limit_predict_batches=0.5) == expected


def test_own_batches_need_not_be_taken_apart(recwarn: pytest.WarningsRecorder) -> None:
    expected = _predict(LOADERS["own batches"], 1, whole=True)
    assert _predict(LOADERS["own batches"], 2, whole=True) == expected
    assert not [w for w in recwarn if "predict_step" in str(w.message)]


def test_shuffled_predictions_of_an_unseeded_run_are_all_there() -> None:
    """Each rank would draw an order of its own."""
    torch.seed()
    loader: Any = DataLoader(ROWS, 4, shuffle=True)  # type: ignore[arg-type]
    batches = boring.trainer().predict(Names(), loader)
    assert batches is not None
    assert [len(batch[1]) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert sorted(torch.cat([batch[0] for batch in batches]).tolist()) == list(range(23))
    assert all(
        name == f"row {int(v)}"
        for values, names in batches
        for v, name in zip(values, names, strict=True)
    )


def test_batches_made_before_are_all_there() -> None:
    """They are made of the rank's share, which nobody could know."""
    predicted = _predict(_batches(MadeBefore), 2)
    assert sorted(value for batch in predicted for value in batch[0]) == list(range(23))


@pytest.mark.parametrize("kind", [Growing, MadeBefore, BatchSampler])
def test_without_a_distributed_sampler_predictions_are_those_of_rank_zero(kind: Any) -> None:
    def loader() -> Any:
        return _batches(kind)()

    expected = _predict(loader, 1)
    assert _predict(loader, 2, use_distributed_sampler=False) == expected


def test_shuffled_without_a_distributed_sampler_is_that_of_rank_zero() -> None:
    torch.seed()
    loader: Any = DataLoader(ROWS, 4, shuffle=True)  # type: ignore[arg-type]
    batches = boring.trainer(use_distributed_sampler=False).predict(Names(), loader)
    assert batches is not None
    assert sorted(torch.cat([batch[0] for batch in batches]).tolist()) == list(range(23))


class _Padded(pl.LightningDataModule):
    def predict_dataloader(self) -> Any:
        trainer = self.trainer
        assert trainer is not None
        sampler = DistributedSampler(ROWS, trainer.world_size, trainer.global_rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(ROWS, batch_size=4, sampler=sampler)  # type: ignore[arg-type]


def test_padding_of_a_sampler_of_ones_own_is_dropped() -> None:
    expected = _predict(LOADERS["plain"], 1)
    assert _predict(_Padded, 2) == expected
    assert _predict(_Padded, 2, limit_predict_batches=2) == expected[:2]


# Samplers that were made for another rank


def _given(stage: str, sampler: Any) -> tuple[Any, Any]:
    """What calls the Trainer at a stage, and the loaders for it."""
    good: Any = DataLoader(boring.blobs(), 4)
    bad: Any = DataLoader(boring.blobs(), **sampler)
    if stage == "fit":
        return pl.Trainer.fit, (bad, good)
    if stage == "fit's validation":
        return pl.Trainer.fit, (good, bad)
    return getattr(pl.Trainer, stage), (bad,)


@pytest.mark.parametrize("stage", ["fit", "fit's validation", "validate", "test", "predict"])
def test_sampler_of_another_rank_is_refused(stage: str) -> None:
    """It is that of rank 0 on every rank."""
    sampler = DistributedSampler(boring.blobs(), 2, rank=0)
    call, loaders = _given(stage, {"sampler": sampler, "batch_size": 4})
    with pytest.raises(MisconfigurationException, match=r"rank=0.*not that of rank 1 of 2") as info:
        call(boring.trainer(), boring.Classifier(), *loaders)
    assert "self.trainer.global_rank" in str(info.value)


@pytest.mark.parametrize("world_size", [1, 3])
def test_sampler_for_another_number_of_ranks_is_refused(world_size: int) -> None:
    sampler = DistributedSampler(boring.blobs(), world_size, rank=0)
    loader = DataLoader(boring.blobs(), 4, sampler=sampler)
    with pytest.raises(MisconfigurationException, match=rf"num_replicas={world_size}"):
        boring.trainer().fit(boring.Classifier(), loader)


def test_sampler_of_another_rank_within_a_batch_sampler_is_refused() -> None:
    sampler = DistributedSampler(boring.blobs(), 2, rank=0)
    loader = DataLoader(boring.blobs(), batch_sampler=BatchSampler(sampler, 4, False))
    trainer = boring.trainer(use_distributed_sampler=False)
    with pytest.raises(MisconfigurationException, match="not that of rank 1 of 2"):
        trainer.fit(boring.Classifier(), loader)
