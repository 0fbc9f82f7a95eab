"""A sweep's report: its journal, what is read from it, and what is drawn."""

import json
import logging
import math
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import journals
import pytest
import sklearn.ensemble  # noqa: F401  (sets variables of the environment; no test's leak)
from browser import rendered
from command import run
from journals import ACT, DEPTH, DROP, FLAG, FOUR, L1, LR
from matplotlib.colors import to_hex, to_rgb

from hydra_plugins.ray_tune_sweeper.config import AshaConf, RandomConf, RayTuneSweeperConf
from lightning_mgpu.errors import ConfigError
from lightning_mgpu.format import duration
from lightning_mgpu.sweep import main as running
from lightning_mgpu.sweep.report import draw
from lightning_mgpu.sweep.report import importance as importances
from lightning_mgpu.sweep.report.axes import axis_of, log_ticks, metric_axis, shorten
from lightning_mgpu.sweep.report.html import parameters
from lightning_mgpu.sweep.report.html.table import table
from lightning_mgpu.sweep.report.importance import importance
from lightning_mgpu.sweep.report.lanes import time_unit, timeline
from lightning_mgpu.sweep.report.model import Dimension
from lightning_mgpu.sweep.report.png.parallel import parallel
from lightning_mgpu.sweep.report.reader import read
from lightning_mgpu.sweep.report.views import RANKS, best_so_far, curves, has_curves, saving
from lightning_mgpu.sweep.space.space import Choice, Interval, Space
from lightning_mgpu.sweep.store.journal import Journal
from lightning_mgpu.sweep.store.records import Records, TrialRecord

HERE = Path()
PICTURES = [
    *("epochs.png", "importance.png", "learning_curves.png"),
    *("parallel_coordinates.png", "parameters.png", "timeline.png"),
]
SECTIONS = ("curves", "parallel", "importance", "parameters", "workers", "epochs")


def small(**about: Any) -> journals.Journal:
    """Three trials on two workers: done, stopped, failed."""
    journal = journals.Journal(HERE, [LR], **about)
    journal.start(0, 10, {"model.lr": 0.001}, "a")
    journal.start(1, 10, {"model.lr": 0.01}, "b")
    journal.report(0, 11, 0, 0.2)
    journal.report(1, 12, 0, 0.3)
    journal.end(1, 12, "stopped")
    for epoch, value in enumerate((0.9, 0.5, 0.4), start=1):
        journal.report(0, 11 + epoch, epoch, value)
    journal.end(0, 15)
    journal.start(2, 16, {"model.lr": 0.1}, "b")
    journal.report(2, 17, 0, 0.95)
    journal.end(2, 18, "failed", "ValueError: no")
    return journal


def test_journal_tells_what_became_of_each_trial() -> None:
    small()
    sweep = read(HERE)
    assert [(t.number, t.status, t.reason) for t in sweep.trials] == [
        *((0, "done", ""), (1, "stopped", ""), (2, "failed", "ValueError: no")),
    ]
    assert [trial.seconds for trial in sweep.trials] == [5, 2, 2]
    assert sweep.trials[0].params == {"model.lr": 0.001}
    assert sweep.history(sweep.trials[0]) == [(1, 0.2), (2, 0.9), (3, 0.5), (4, 0.4)]
    assert sweep.trials[1].stretches[0].host == "here"


@pytest.mark.parametrize(
    ("mode", "takes_best", "value", "best"),
    [("max", True, 0.9, 0), ("max", False, 0.4, 0), ("min", True, 0.2, 0), ("min", False, 0.4, 1)],
)
def test_value_is_the_best_or_the_last_and_failed_trials_have_none(
    mode: str, takes_best: bool, value: float, best: int
) -> None:
    small(mode=mode, takes_best=takes_best)
    sweep = read(HERE)
    assert sweep.value(sweep.trials[0]) == value
    assert sweep.value(sweep.trials[2]) is None
    assert sweep.best() is sweep.trials[best]


def test_of_several_metrics_the_first_is_drawn() -> None:
    journal = journals.Journal(HERE, [LR], metric=["val_acc", "size"], mode=["max", "min"])
    journal.start(0, 1, {"model.lr": 0.1})
    journal.write("report", 2, trial=0, epoch=0, metrics={"val_acc": 0.5, "size": 9.0})
    sweep = read(HERE)
    assert (sweep.metric, sweep.mode, sweep.value(sweep.trials[0])) == ("val_acc", "max", 0.5)


def test_lines_that_were_cut_short_are_passed_over() -> None:
    journal = small()
    with journal.path.open("a") as file:
        file.write('{"event": "report", "trial": 1, "ti')
    assert [trial.status for trial in read(HERE).trials] == ["done", "stopped", "failed"]


def test_trial_that_begins_again_counts_once() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 0, {"model.lr": 0.1}, "a")
    journal.report(0, 1, 0, 0.1)
    journal.report(0, 2, 1, 0.8)
    journal.write("retry", 3, trial=0, reason="its process died")
    journal.start(0, 4, {"model.lr": 0.1}, "b")
    journal.report(0, 5, 0, 0.2)
    journal.end(0, 6)
    sweep = read(HERE)
    (trial,) = sweep.trials
    assert sweep.history(trial) == [(1, 0.2)]
    assert [(s.worker, s.outcome, s.end - s.start) for s in trial.stretches] == [
        *(("a", "failed", 3), ("b", "done", 2)),
    ]


def test_trial_that_goes_on_after_a_pause_keeps_what_it_has_done() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 0, {"model.lr": 0.1})
    journal.report(0, 1, 0, 0.1)
    journal.write("pause", 2, trial=0)
    journal.start(0, 8, {"model.lr": 0.1})
    journal.report(0, 9, 1, 0.2)
    sweep = read(HERE)
    (trial,) = sweep.trials
    assert sweep.history(trial) == [(1, 0.1), (2, 0.2)]
    assert trial.status == "unfinished"
    assert [s.outcome for s in trial.stretches] == ["paused", "unfinished"]
    assert trial.seconds == 3


def test_population_goes_back_in_time_in_a_new_piece_of_its_curve() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 0, {"model.lr": 0.1})
    for epoch in range(3):
        journal.report(0, 1 + epoch, epoch, 0.1 * epoch)
    journal.start(0, 5, {"model.lr": 0.05})
    journal.report(0, 6, 1, 0.7)
    journal.end(0, 7)
    sweep = read(HERE)
    assert sweep.trials[0].params == {"model.lr": 0.05}
    (curve,) = curves(sweep)
    assert [[at for at, _ in piece] for piece in curve.pieces] == [[1, 2, 3], [2]]


@pytest.mark.parametrize(("takes_best", "lr"), [(True, 0.1), (False, 0.3)])
def test_values_that_have_changed_are_those_of_the_report_that_counts(
    takes_best: bool, lr: float
) -> None:
    journal = journals.Journal(HERE, [LR], takes_best=takes_best)
    for number, value in enumerate((0.9, 0.5)):
        journal.start(0, number, {"model.lr": 0.1 + 0.2 * number})
        journal.report(0, number + 0.5, number, value)
    journal.start(0, 3, {"model.lr": 0.7})  # has not trained with it
    journal.end(0, 4)
    (trial,) = read(HERE).trials
    assert trial.params["model.lr"] == pytest.approx(lr)
    assert trial.command.startswith(f"python app.py model.lr={lr:g}")


def test_validations_within_an_epoch_lie_within_it() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 0, {"model.lr": 0.1})
    for number, epoch in enumerate((0, 0, 1, 1, 2)):
        journal.report(0, 1 + number, epoch, 0.5)
    sweep = read(HERE)
    assert [at for at, _ in sweep.history(sweep.trials[0])] == [0.5, 1, 1.5, 2, 2.5]


def test_jobs_without_epochs_are_counted_by_reports() -> None:
    journal = journals.Journal(HERE, [LR], metric="objective")
    for number in range(6):
        journal.start(number, number, {"model.lr": 0.1 / (number + 1)})
        journal.report(number, number + 0.5, None, float(number))
        journal.end(number, number + 0.5)
    sweep = read(HERE)
    assert not sweep.has_epochs
    assert sweep.history(sweep.trials[3]) == [(1, 3.0)]
    drawn = draw.draw(HERE)
    assert "epochs.png" not in [path.name for path in drawn]
    assert "nothing to save" in Path("report.html").read_text()
    assert not has_curves(sweep)
    assert best_so_far(sweep) == [(number, float(number)) for number in range(6)]


def test_epochs_are_saved_by_those_that_were_stopped_alone() -> None:
    small()
    sweep = read(HERE)
    assert [sweep.epochs(trial) for trial in sweep.trials] == [4, 1, 1]
    assert [sweep.saved(trial) for trial in sweep.trials] == [0, 3, 0]
    assert saving(sweep).startswith("3 of 9 epochs were saved (33%)")


def test_timeline_leaves_out_the_time_until_a_sweep_was_resumed() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 100, {"model.lr": 0.1}, "a")
    journal.end(0, 110)
    journal.start(1, 110, {"model.lr": 0.2}, "a")
    journal.report(1, 112, 0, 0.5)  # here it was killed
    journal.write("sweep", 5000, **journal.about)
    journal.start(1, 5005, {"model.lr": 0.2}, "c")
    journal.end(1, 5010)
    found = timeline(read(HERE))
    assert found.lanes == ["worker 1"]
    assert [(bar.start, bar.end, bar.outcome) for bar in found.bars] == [
        *((0, 10, "done"), (10, 12, "unfinished"), (12, 17, "done")),
    ]
    assert found.resumed == [12]
    assert found.busy == 1


def test_workers_that_follow_each_other_share_a_lane() -> None:
    """As without `reuse_actors`, where each trial has a process of its own."""
    journal = journals.Journal(HERE, [LR])
    for number in range(6):
        begin = 10 * (number // 2)
        journal.start(number, begin, {"model.lr": 0.1}, f"process {number}")
        if number % 2:
            for one in (number - 1, number):
                journal.end(one, begin + 9)
    found = timeline(read(HERE))
    assert found.lanes == ["worker 1", "worker 2"]
    assert {bar.trial.number: bar.lane for bar in found.bars} == {n: n % 2 for n in range(6)}


def test_lanes_of_several_machines_are_named_after_them() -> None:
    journal = journals.Journal(HERE, [LR])
    for number, host in enumerate(("left", "right")):
        journal.start(number, 0, {"model.lr": 0.1}, f"process {number}")
        journal.write("report", 1, trial=number, epoch=0, metrics={}, host=host)
    assert timeline(read(HERE)).lanes == ["left, 1", "right, 2"]


def test_journal_is_what_the_sweep_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "-m"])  # of which commands are made
    space = Space()
    space.add("+model.lr", Interval(1e-4, 1e-1, log=True))
    space.add("act", Choice(("relu", None, [1, 2])))
    options = RayTuneSweeperConf(search_alg=RandomConf(), scheduler=AshaConf(), report="last")
    record = TrialRecord(
        0, {"model.lr": 0.01, "act": None}, ["+model.lr=0.01"], str(tmp_path / "0")
    )
    with Journal(tmp_path) as journal:
        journal.begin(options, space, Records("val_loss", "min", False))
        journal.start(record, SimpleNamespace(temporary_state=SimpleNamespace(ray_actor=None)))
        record.metrics = {"val_loss": 0.5, "other": math.nan}
        journal.report(record, {"epoch": 0, "hostname": "h"})
        record.status, record.reason = "failed", "why"
        journal.end(record)
    sweep = read(tmp_path)
    assert (sweep.metric, sweep.mode, sweep.takes_best) == ("val_loss", "min", False)
    assert (sweep.search_alg, sweep.scheduler) == ("random", "asha")
    lr, act = sweep.dimensions
    assert lr == Dimension("model.lr", low=1e-4, high=0.1, log=True)
    assert act == Dimension("act", choices=("relu", None, [1, 2]))
    (trial,) = sweep.trials
    assert trial.params == {"model.lr": 0.01, "act": None}
    assert trial.directory == "0"
    assert trial.command.endswith("+model.lr=0.01 hydra.mode=RUN")
    assert (trial.status, trial.reason) == ("failed", "why")
    assert sweep.history(trial) == [(1, 0.5)]


def test_journal_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "rep')
    with Journal(tmp_path) as journal:
        journal.pause(3)
    assert json.loads(path.read_text().splitlines()[1])["trial"] == 3


def test_journal_that_cannot_be_written_costs_no_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with Journal(tmp_path) as journal:
        journal.pause(1)
        journal.pause(2)
    assert len(caplog.records) == 1
    assert "the sweep will have no report" in caplog.text


def test_axes_are_named_as_shortly_as_is_clear() -> None:
    names = ["model.lr", "model.encoder.dropout", "model.decoder.dropout", "optimizer:kind"]
    journals.Journal(HERE, [{**LR, "name": name} for name in names])
    sweep = read(HERE)
    labels = [axis_of(sweep, dimension).label for dimension in sweep.dimensions]
    assert labels == ["lr", "encoder.dropout", "decoder.dropout", "kind"]


def test_axes_follow_how_values_were_searched() -> None:
    mixed = {"name": "mixed", "choices": ["b", None, True, 3, [1, 2]]}
    wide = {"name": "wide", "low": 1, "high": 1000, "log": True, "integer": True}
    many = {"name": "many", "choices": [2**power for power in range(14)]}
    narrow = {**LR, "name": "narrow", "low": 0.5, "high": 0.9}
    journals.Journal(HERE, [LR, L1, DROP, DEPTH, ACT, mixed, wide, many, narrow])
    sweep = read(HERE)
    lr, l1, drop, depth, act, of_mixed, of_wide, of_many, of_narrow = (
        axis_of(sweep, dimension) for dimension in sweep.dimensions
    )
    assert (lr.log, [words for _, words in lr.ticks]) == (True, ["0.0001", "0.001", "0.01", "0.1"])
    assert l1.categories == ("4", "8", "16", "32", "64", "128", "256")
    assert l1.place(16) == 2
    assert (drop.log, drop.categories, drop.place(0.25)) == (False, None, 0.25)
    assert depth.categories == tuple("12345678")
    assert act.categories == ("relu", "gelu", "silu")
    assert of_mixed.categories == ("b", "null", "true", "3", "[1, 2]")
    assert (of_wide.log, of_wide.categories) == (True, None)
    assert (of_many.log, of_many.linear(100)) == (True, 2)
    assert not of_narrow.log


def test_loss_over_orders_of_magnitude_is_logarithmic() -> None:
    journal = journals.Journal(HERE, [LR], metric="loss", mode="min")
    journal.start(0, 0, {"model.lr": 0.1})
    journal.report(0, 1, 0, 1000.0)
    assert not metric_axis(read(HERE)).log
    journal.report(0, 2, 1, 0.1)
    assert metric_axis(read(HERE)).log


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.05, 0.9, ["0.05", "0.1", "0.2", "0.5"]),
        (1, 300, ["1", "3", "10", "30", "100", "300"]),
        (1e-12, 1e8, ["1e-12", "1e-09", "1e-06", "0.001", "1", "1000", "1e+06"]),
    ],
)
def test_marks_of_logarithmic_axes_are_few_and_round(
    low: float, high: float, words: list[str]
) -> None:
    assert [word for _, word in log_ticks(low, high)] == words


def test_words_are_shortened_in_the_middle_and_times_are_readable() -> None:
    assert shorten("short") == "short"
    assert shorten("a_very_long_name_of_a_value", 11) == "a_ver…value"
    assert [duration(at) for at in (0.0125, 0.312)] == ["12.5 ms", "312 ms"]
    assert [duration(at) for at in (1.25, 42.4, 61, 3725)] == [
        "1.25 s",
        "42.4 s",
        "1 min 01 s",
        "1 h 02 min",
    ]
    assert [time_unit(at)[0] for at in (100, 1000, 100_000)] == ["seconds", "minutes", "hours"]


@pytest.mark.parametrize("library", ["optuna", "none"])
def test_learning_rate_matters_most(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the search is made; a value without any effect is not the most important."""
    if library == "none":
        monkeypatch.setattr(importances, "find_spec", lambda _: None)
    journals.write_search(HERE, 60, [*FOUR, FLAG])
    found = importance(read(HERE))
    assert found is not None
    assert found.shares.keys() == {d["name"] for d in [*FOUR, FLAG]}
    assert next(iter(found.shares)) == "model.lr"
    assert all(0 <= share <= 1 for share in found.shares.values())
    assert found.method.startswith("fANOVA" if library == "optuna" else "epsilon squared")


def test_epsilon_squared_by_hand() -> None:
    # Means 1.5 and 5.5; within 1, in all 17; 2 degrees of freedom: (17 - 1 - 1/2) / 17.
    assert importances._epsilon_squared([0, 0, 1, 1], [1, 2, 5, 6]) == pytest.approx(15.5 / 17)
    assert importances._epsilon_squared([0, 1, 0, 1], [1, 1, 2, 2]) == 0
    assert importances._epsilon_squared([0, 1, 2], [1, 2, 3]) == 0  # each a group of its own


def test_few_or_equal_trials_say_nothing_about_importance() -> None:
    small()
    assert importance(read(HERE)) is None
    Path("journal.jsonl").unlink()
    journal = journals.Journal(HERE, [LR])
    for number in range(8):
        journal.start(number, number, {"model.lr": 0.01 * (number + 1)})
        journal.report(number, number, 0, 0.5)
        journal.end(number, number)
    assert importance(read(HERE)) is None


@pytest.mark.slow
def test_report_is_one_page_that_needs_no_other_and_pictures() -> None:
    journals.write_search(HERE / "sweep", 24)
    page, *pictures = draw.draw("sweep")
    assert page == Path("sweep/report.html")
    assert sorted(path.name for path in pictures) == PICTURES
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert 5_000 < path.stat().st_size < 500_000
    text = page.read_text()
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=[\"'](?!data:)", text)
    assert len(re.findall(r"<tr[ >]", text)) == 25
    assert "python app.py model.lr=" in text
    draw.draw("sweep")  # once more over what is there
    assert sorted(path.name for path in Path("sweep/report").iterdir()) == PICTURES


@pytest.mark.parametrize(
    ("mode", "numbers"), [("max", "0 1 2"), ("min", "0 1 2"), ("last", "1 0 2")]
)
def test_table_begins_with_the_best_and_leads_to_directories(mode: str, numbers: str) -> None:
    journal = small(mode="min" if mode == "last" else mode, takes_best=mode != "last")
    journal.start(3, 20, {"model.lr": 0.1}, "b", directory="odd name/3")
    sweep = read(HERE)
    text = table(sweep)
    rows = re.findall(r"<th scope=\"row\"[^>]*>(?:<a href=\"([^\"]*)\">)?(\d)", text)
    assert [number for _, number in rows] == [*numbers.split(), "3"]
    assert {number: link for link, number in rows}["3"] == "odd%20name/3/"
    assert {number: link for link, number in rows}["0"] == ""  # an older journal
    order = "descending" if mode == "max" else "ascending"
    heads = re.findall(r'aria-sort="(\w+)"', text)
    assert heads[2] == order
    assert set(heads) == {order, "none"}


def test_values_that_some_trials_do_not_have() -> None:
    """They are dashes in the table, and no part of what compares all trials."""
    journal = journals.Journal(HERE, [LR, ACT, DROP])
    for number in range(6):
        params = {"model.lr": 0.001 * (number + 1), "model.act": ("relu", "gelu")[number % 2]}
        if number % 2:
            params["model.dropout"] = 0.1 * number
        journal.start(number, number, params)
        journal.report(number, number + 1, 0, number / 10)
        journal.end(number, number + 1)
    sweep = read(HERE)
    assert table(sweep).count("<td>–</td>") == 3
    lines = parameters.parallel(sweep)
    assert lines is not None
    labels = [column.label for column in lines.data[0].dimensions]
    assert labels == ["lr", "act", "val_acc"]
    assert parallel(sweep) is not None
    found = importance(sweep)
    assert found is not None
    assert set(found.shares) == {"model.lr", "model.act"}
    points = parameters.scatter(sweep)
    assert points is not None
    assert [text.text for text in points.layout.annotations] == ["lr", "act", "dropout"]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_best_trials_are_the_strongest_lines_of_parallel_coordinates(mode: str) -> None:
    journal = journals.Journal(HERE, [LR], mode=mode)
    for number, value in enumerate((0.1, 0.2, 0.3)):
        journal.start(number, number, {"model.lr": 0.01 * (number + 1)})
        journal.report(number, number + 0.5, 0, value)
    sweep = read(HERE)
    figure = parameters.parallel(sweep)
    assert figure is not None
    line = figure.data[0].line
    best = 2 if mode == "max" else 0
    assert max(range(3), key=line.color.__getitem__) == best
    assert (line.cmin, line.cmax) == (min(line.color), max(line.color))
    assert [one[1] for one in line.colorscale] == list(RANKS)
    drawn = parallel(sweep)
    assert drawn is not None
    ranks = [to_hex(one.get_color()) for one in drawn.axes[0].lines[:3]]
    assert (ranks[0], ranks[2]) == (RANKS[0], RANKS[-1])  # the last one is on top
    darkness = [sum(to_rgb(colour)) for colour in RANKS]
    assert darkness == sorted(darkness, reverse=True)


@pytest.mark.parametrize("values", [(0.001, 0.003), (0.002, 0.0021), (0.002, 0.002), (1e-4, 0.1)])
def test_logarithmic_axis_stays_within_its_plot(values: tuple[float, float]) -> None:
    journal = journals.Journal(HERE, [LR])
    for number, value in enumerate(values):
        journal.start(number, number, {"model.lr": value})
        journal.report(number, number + 0.5, 0, 0.1 * number)
    figure = parameters.parallel(read(HERE))
    assert figure is not None
    column = figure.data[0].dimensions[0]
    low, high = column.range
    assert low <= math.log10(values[0]) <= math.log10(values[1]) <= high
    assert high - low < 1.1 * math.log10(values[1] / values[0]) + 0.3
    assert len(column.tickvals) == len(column.ticktext) > 0
    assert all(low <= at <= high for at in column.tickvals)


def test_what_trials_say_is_text_and_no_markup() -> None:
    odd = "</script><b onclick='x'>$x_{y&"
    journal = journals.Journal(HERE, [{"name": "a<i>", "choices": [odd, "b"]}], metric="m<u>$")
    for number, value in enumerate([odd, "b"] * 4):
        journal.start(number, number, {"a<i>": value})
        journal.report(number, number + 0.5, 0, float(number))
        journal.report(number, number + 0.6, 1, float(number))
        failed = number == 7
        journal.end(number, number + 0.9, *(("failed", odd) if failed else ("done",)))
    text = draw.draw(HERE)[0].read_text()
    assert "<b onclick" not in text
    assert "<u>" not in text
    assert "&lt;/script&gt;&lt;b onclick=" in text


@pytest.mark.parametrize("case", ["none started", "none reported", "one", "one failed"])
def test_sweep_with_little_in_it_has_a_report_too(case: str) -> None:
    journal = journals.Journal(HERE, FOUR)
    if case != "none started":
        values = {"model.lr": 0.1, "model.l1": 4, "model.dropout": 0.1, "model.act": "relu"}
        journal.start(0, 0, values)
        if case != "none reported":
            journal.report(0, 1, 0, 0.5)
            journal.end(0, 2, *(("failed", "why") if case == "one failed" else ()))
    page, *pictures = draw.draw(HERE)
    assert "At least two trials must have a result" in page.read_text()
    assert bool(pictures) == (case != "none started")


def test_report_of_trials_without_a_metric_does_not_say_that_they_did_not_train() -> None:
    journal = journals.Journal(HERE, [LR])
    journal.start(0, 0, {"model.lr": 0.1})
    journal.end(0, 9, "failed", "hydra.sweeper.metric=val_acc was never logged")
    page = draw.draw(HERE)[0].read_text()
    assert "No trial has reported the metric" in page
    assert "nothing to save" not in page


def test_pictures_that_show_nothing_any_more_go() -> None:
    small()
    Path("report").mkdir()
    Path("report/importance.png").write_text("of another time")
    draw.draw(HERE)
    assert not Path("report/importance.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "mode=report: no sweep given. Set its directory: sweep="),
        (("sweep=nowhere",), "nowhere: there is no such directory"),
        (("sweep=.",), "there is no journal.jsonl. Name the directory of a sweep by"),
        (("sweep=damaged",), "journal.jsonl holds no sweep"),
    ],
)
def test_command_says_in_a_line_what_is_missing(arguments: tuple[str, ...], message: str) -> None:
    Path("damaged").mkdir()
    Path("damaged/journal.jsonl").write_text("{\n")
    done = run("mode=report", *arguments)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize("library", ["plotly", "matplotlib"])
def test_missing_extra_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small()
    without(monkeypatch, library)
    done = run("mode=report", "sweep=.")
    assert done.code == 2
    assert f"needs {library}: pip install 'lightning_mgpu[report]'" in done.err


def without(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found = util.find_spec
    missing = lambda name: None if name == library else found(name)  # noqa: E731
    monkeypatch.setattr(draw, "find_spec", missing)


@pytest.mark.slow
def test_command_draws_without_torch() -> None:
    small()
    code = """
import sys
sys.argv = ['-m']; sys.orig_argv = ['python', '-m', 'lightning_mgpu']
from lightning_mgpu.__main__ import main
sys.argv = ['lightning_mgpu', 'mode=report', 'sweep=.', 'hydra.run.dir=run']
main()
print({'torch', 'lightning', 'ray', 'matplotlib.pyplot'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *pictures, imported = done.stdout.splitlines()
    assert first == "Report: report.html"
    assert "  report/timeline.png" in pictures
    assert imported == "set()"


def test_train_refuses_to_draw(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from lightning_mgpu.cli.run import train

    with pytest.raises(ConfigError, match=r"mode=report: only draws existing results.*command"):
        train(OmegaConf.create({"mode": "report", "output_dir": str(tmp_path)}))


@pytest.mark.parametrize("goes_wrong", ["extra", "drawing"])
def test_report_that_cannot_be_drawn_costs_no_sweep(
    goes_wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if goes_wrong == "extra":
        without(monkeypatch, "plotly")
    sweep: Any = SimpleNamespace(directory=Path("/nowhere"))
    assert running._draw(sweep) is None
    (line,) = caplog.messages
    assert "mode=report sweep=/nowhere" in line
    expected = {"extra": "pip install 'lightning_mgpu[report]'", "drawing": "no such directory"}
    assert expected[goes_wrong] in line


@pytest.mark.slow
def test_browser_shows_every_figure_and_sorts_the_table() -> None:
    journals.write_search(HERE, 30)
    page = draw.draw(HERE)[0]
    # The head of the third column, the metric's, is clicked twice: the best first.
    click = "document.querySelectorAll('th button')[2].click();"
    page.write_text(f"{page.read_text()}<script>{click}{click}</script>")
    document, console = rendered(page, Path("page.png"))
    assert console == ""
    for name in SECTIONS:
        part = document.partition(f'id="figure-{name}"')[2].partition("</section>")[0]
        assert "main-svg" in part, f"{name} is not drawn"
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", document, re.DOTALL)[1:]
    cells = [re.findall(r"<t[dh]([^>]*)>", row)[2] for row in rows]
    keys = [cell.partition('data-key="')[2].partition('"')[0] for cell in cells]
    values = [float(key) for key in keys if key]
    assert values == sorted(values, reverse=True)
    assert len(values) == sum(trial.status != "failed" for trial in read(HERE).trials)
    assert keys[: len(values)] == [key for key in keys if key]  # what is empty comes last
    assert 'aria-sort="descending"' in document
    assert Path("page.png").stat().st_size > 50_000
