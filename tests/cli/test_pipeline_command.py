"""`pipeline` and `pipeline_ddp` from the command line."""

import csv
from pathlib import Path

import command
import pytest
from configs import config

from lightning_mgpu.config.build import build


@pytest.mark.slow
def test_trains_digits_and_shows_the_stages() -> None:
    done = command.run(
        "+strategy=pipeline", "trainer.devices=2", "model=resnet", "trainer.max_epochs=3"
    )
    assert done.code == 0, done.err
    assert float(done.metrics["test_acc"]) >= 0.97
    shown = done.out + done.err
    assert "stage  device  layers" in shown
    assert "8 micro-batches; devices wait 8% of the time" in shown


@pytest.mark.slow
def test_multirun_of_all_strategies_agrees(tmp_path: Path) -> None:
    strategies = ["pipeline", "pipeline_ddp", "dp", "ddp", "auto"]
    done = command.run(
        *("-m", f"+strategy={','.join(strategies)}", "model=mlp", "model.lr=0.003"),
        *("trainer.max_epochs=3", "hydra.sweep.dir=sweep"),
    )
    assert done.code == 0, done.err
    found = [_test_accuracy(tmp_path / "sweep" / str(job)) for job in range(len(strategies))]
    assert not (tmp_path / "sweep" / str(len(strategies))).exists()
    accuracies = dict(zip(strategies, found, strict=True))
    assert accuracies["auto"] > 0.9
    # One process sees the same batches as one device; two see other ones.
    assert accuracies["pipeline"] == pytest.approx(accuracies["auto"], abs=0.01)
    assert accuracies["dp"] == pytest.approx(accuracies["auto"], abs=0.01)
    assert accuracies["pipeline_ddp"] == pytest.approx(accuracies["ddp"], abs=0.01)
    assert accuracies["ddp"] == pytest.approx(accuracies["auto"], abs=0.05)


def _test_accuracy(job: Path) -> float:
    with (job / "metrics.csv").open() as file:
        found = [row["test_acc"] for row in csv.DictReader(file) if row.get("test_acc")]
    assert len(found) == 1, "run once"
    return float(found[0])


def test_several_pipelines_are_two_on_the_cpu_by_default() -> None:
    trainer = build(config("+strategy=pipeline_ddp", "trainer.accelerator=cpu"), []).trainer
    assert (trainer.num_devices, trainer.world_size) == (4, 2)


def test_wrong_number_of_devices_is_one_line() -> None:
    done = command.run_tiny("+strategy=pipeline_ddp", "trainer.devices=3")
    assert done.code == 2
    assert "3 devices cannot be divided into processes with 2 stages" in done.err
    assert "Traceback" not in done.err
