"""What loggers have written on the workers stays, from call to call."""

import csv
import os
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typing_extensions import override

from lightning_mgpu.ray import RayStrategy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class _Failing(boring.Classifier):
    """Fails in the fifth step on rank `rank`, or kills its process for a file that it takes away.

    Its logs are of rank 0 alone, as those of many are.
    """

    def __init__(self, rank: int | None = None, ticket: Path | None = None) -> None:
        super().__init__()
        self.rank, self.ticket = rank, ticket

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == self.rank and self.global_step == 4:
            if self.ticket is None:
                raise ZeroDivisionError
            if self.ticket.exists():
                self.ticket.unlink()
                os.kill(os.getpid(), 9)
        loss = self._loss(batch)
        self.log("loss", loss)
        return loss


def _trainer(strategy: Any, logger: Logger, **kwargs: Any) -> pl.Trainer:
    auto: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, **kwargs}
    return boring.trainer(strategy, 1 if strategy == "auto" else "auto", **auto)


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def _steps(logger: CSVLogger, name: str = "loss") -> list[int]:
    return [int(row["step"]) for row in _rows(logger) if row.get(name)]


def test_csv_of_fit_test_and_the_program_as_in_one_process() -> None:
    def rows(strategy: Any) -> list[dict[str, str]]:
        logger = CSVLogger(f"logs-{strategy == 'auto'}", version=0)
        trainer, model = _trainer(strategy, logger), boring.Classifier()
        trainer.fit(model, datamodule=boring.Blobs(world_size=1))
        trainer.test(model, datamodule=boring.Blobs())
        logger.log_metrics({"mine": 1.0}, step=7)
        trainer.validate(model, datamodule=boring.Blobs())
        return _rows(logger)

    ours, theirs = rows(RayStrategy(num_workers=1)), rows("auto")
    for mine, other in zip(ours, theirs, strict=True):
        assert [name for name in mine if mine[name]] == [name for name in other if other[name]]
        values = [float(value) for value in other.values() if value]
        assert [float(v) for v in mine.values() if v] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_csv_keeps_what_was_logged_before_a_failure(rank: int) -> None:
    logger = CSVLogger("logs", flush_logs_every_n_steps=1000)
    trainer = _trainer(RayStrategy(num_workers=2), logger)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(_Failing(rank), datamodule=boring.Blobs())
    assert _steps(logger) == [0, 1, 2, 3]
    trainer.test(boring.Classifier(), datamodule=boring.Blobs())
    assert _steps(logger) == [0, 1, 2, 3]
    assert len(_steps(logger, "test_loss")) == 1


def test_csv_goes_on_with_new_workers(tmp_path: Path) -> None:
    ticket = tmp_path / "ticket"
    ticket.touch()
    logger = CSVLogger("logs")
    strategy = RayStrategy(num_workers=1, max_failures=1)
    trainer = _trainer(strategy, logger, max_epochs=3)
    trainer.fit(_Failing(0, ticket), datamodule=boring.Blobs(size=16))  # four steps an epoch
    assert not ticket.exists()
    assert _steps(logger) == list(range(12))


class _InMemory(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    name = version = "memory"

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, sorted(metrics)))

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def test_logger_of_ones_own_returns_with_what_it_holds() -> None:
    logger = _InMemory()
    trainer = _trainer(RayStrategy(num_workers=1), logger)
    trainer.fit(_Failing(), datamodule=boring.Blobs(size=16))
    trainer.test(boring.Classifier(), datamodule=boring.Blobs())
    seen = [(step, names) for step, names in logger.rows if {"loss", "test_loss"} & set(names)]
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert trainer.logger is logger


def test_tensorboard_has_what_every_call_wrote() -> None:
    logger = TensorBoardLogger("board")
    trainer = _trainer(RayStrategy(num_workers=1), logger)
    trainer.fit(_Failing(), datamodule=boring.Blobs(size=16))
    trainer.test(boring.Classifier(), datamodule=boring.Blobs())
    steps: dict[str, list[int]] = {"loss": [], "test_loss": []}
    for path in Path(logger.log_dir).glob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for name in steps.keys() & set(events.Tags()["scalars"]):
            steps[name] += [event.step for event in events.Scalars(name)]
    assert sorted(steps["loss"]) == [0, 1, 2, 3]
    assert len(steps["test_loss"]) == 1
