"""What becomes of a sweep whose metric is not logged, and what a trial is worth."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial
from sweeps import cluster, sweep

from lightning_mgpu.sweep.search.stopper import SweepStopper
from lightning_mgpu.sweep.store.notices import Notices, notify
from lightning_mgpu.sweep.store.records import FINAL, Records, TrialRecord
from lightning_mgpu.sweep.trial.failures import (
    MetricMissingError,
    SweepTrial,
    TrialFailedError,
    failures_in_words,
)
from lightning_mgpu.sweep.trial.reporting import NotFiniteError, Reporting
from lightning_mgpu.sweep.trial.run_trial import report_end
from lightning_mgpu.sweep.trial.trial_plan import TrialPlan


def worth(
    value: Any, *metrics: str, sent: int = 0, are_logged: bool = True, **logged: float
) -> dict[str, Any] | None:
    """What a trial reports at its end that has logged so and returns `value`."""
    found: list[dict[str, Any]] = []
    reporting = Reporting(
        send=lambda metrics, _: found.append(metrics),
        metrics=metrics if are_logged else (),
        logged=logged,
        sent=sent,
    )
    plan: Any = object.__new__(TrialPlan)
    vars(plan).update(objectives=metrics, are_logged=are_logged)
    report_end(plan, reporting, value)
    return found[0] if found else None


def test_returned_number_is_not_taken_for_a_metric_that_was_named() -> None:
    expected = (
        r"metric=val_los was never logged; logged were: train_loss, val_loss\. Did you mean"
        r" val_loss\? The job returned 0\.5, which counts if hydra\.sweeper\.metric is left out"
    )
    with pytest.raises(MetricMissingError, match=expected):
        worth(0.5, "val_los", val_loss=0.1, train_loss=0.2)
    with pytest.raises(MetricMissingError, match=r"metric=acc was never .* were: loss\.$"):
        worth(None, "loss", "acc", loss=0.1)


def test_metric_counts_that_is_logged_after_training_or_returned_by_its_name() -> None:
    assert worth(0.5, "test/acc", **{"test/acc": 0.75}) == {"test/acc": 0.75}
    assert worth({"acc": 0.5, "more": "words"}, "acc", "loss", loss=1) == {"acc": 0.5, "loss": 1}
    assert worth(0.5, "loss", sent=1, loss=1) is None  # it has been reported already
    with pytest.raises(NotFiniteError, match="test/acc is nan"):
        worth(0.5, "test/acc", **{"test/acc": float("nan")})


def test_what_is_returned_counts_if_no_metric_was_named() -> None:
    assert worth(0.5, "value", are_logged=False) == {"value": 0.5}
    with pytest.raises(TrialFailedError, match=r"returned None and named no metric.*\(val_loss\)"):
        worth(None, "value", are_logged=False, val_loss=0.1)


@pytest.mark.parametrize(
    ("value", "better", "expected"),
    [
        (0.5, "min", {"loss": 0.5}),
        ({"loss": 0.25, "more": 3}, "min", {"loss": 0.25}),
        (None, "min", {"loss": 1.0}),
        (None, "max", {"loss": 3.0}),
        ("words", None, {"loss": 2.0}),
    ],
)
def test_job_with_several_fits_is_worth_what_it_returns(
    value: Any, better: str | None, expected: dict[str, float]
) -> None:
    found: list[dict[str, Any]] = []
    held = [{"loss": number, "epoch": 0, "acc": 0.1} for number in (3.0, 1.0, 2.0)]
    reporting = Reporting(lambda metrics, _: found.append(metrics), ("loss",), has_folds=True)
    reporting.held, reporting.sent = held, 4
    plan: Any = object.__new__(TrialPlan)
    vars(plan).update(objectives=("loss",), are_logged=True, better=better)
    report_end(plan, reporting, value)
    assert found == [{**expected, "epoch": 0, "acc": 0.1, FINAL: True}]


def test_trial_without_the_metric_is_not_tried_again() -> None:
    with pytest.raises(MetricMissingError) as caught, failures_in_words():
        raise MetricMissingError("hydra.sweeper.metric=a was never logged")
    trial: Any = Trial("__fake", stub=True, max_failures=3)
    trial.storage = Mock(trial_driver_staging_path=None)  # no files
    SweepTrial.take_over(trial)
    trial.handle_error(RayTaskError("train", "Traceback: of the actor", caught.value))
    assert not trial.should_recover()
    assert trial.failure == "hydra.sweeper.metric=a was never logged"


def test_sweep_stops_for_what_no_trial_can_do() -> None:
    records = Records("acc", "max", takes_best=True)
    records.trials[0] = TrialRecord(0, {}, [], "0")
    stopper = SweepStopper(records, 1.0, None)
    assert not records.has_results()
    assert not stopper.stop_all()
    records.fatal = "trial 0: hydra.sweeper.metric=acc was never logged"
    assert stopper.stop_all()


def test_warning_of_trials_is_logged_once_in_a_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notify(tmp_path, "metric", "of a driver that was killed")
    with caplog.at_level(logging.WARNING), Notices(tmp_path) as notices:
        for number in range(2):
            notify(tmp_path, "metric", f"trial {number} has not logged it")
            notices.on_step_end(0, [])
        notify(tmp_path, "files", "at the very end")
    assert caplog.messages == ["trial 0 has not logged it", "at the very end"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ray_address() -> Iterator[str]:
    with cluster() as address:
        yield address


@pytest.mark.slow
def test_misspelt_metric_ends_the_sweep_at_its_first_trial(ray_address: str) -> None:
    done = sweep(
        "plain_app.py",
        ray_address,
        *("model.lr=0.1,0.01,0.001", "epochs=1", "hydra/sweeper/search_alg=grid"),
        *("hydra.sweeper.metric=val_los", "hydra.sweeper.max_concurrent_trials=1"),
        "hydra.sweeper.max_failures=2",
    )
    assert done.code == 1, done.out
    assert "metric=val_los has not been logged by the first validation" in done.out
    assert "trial 0: hydra.sweeper.metric=val_los was never logged; logged were:" in done.err
    assert "Did you mean val_loss?" in done.err
    assert "Traceback" not in done.err
    assert [trial["status"] for trial in done.trials] in (["failed"], ["failed", "unfinished"])
    assert not (done.directory / ".notices").exists()
    assert "metric=val_los was never logged" in (done.directory / "0" / "trial.log").read_text()
