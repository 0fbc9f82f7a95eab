"""The timeline of a pipeline's step: what is measured, and the files it becomes."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import parity_models
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_mgpu import PipelineDDPStrategy, PipelineStrategy
from lightning_mgpu.engine.pipeline.profile import recording
from lightning_mgpu.engine.pipeline.profile.timeline import Kind, PipelineTimeline, StageSpan
from lightning_mgpu.strategies.stages import planning
from lightning_mgpu.strategies.stages.step_trace import chrome_trace
from lightning_mgpu.timeline import drawing as report

FILES = ["timeline.html", "timeline.json", "timeline.png"]


class Deep(parity_models.Model):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


class Failing(Deep):
    """Breaks in the step of that number, from 0."""

    fails_at = 4

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == self.fails_at:
            raise RuntimeError("broken step")
        return loss


def fit(model: pl.LightningModule, devices: int = 2, steps: int = 5, **options: Any) -> pl.Trainer:
    callbacks = options.pop("callbacks", None)
    trainer = boring.trainer(
        PipelineStrategy(trace_dir="trace", **options),
        devices,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=boring.Blobs(8))
    return trainer


def trace() -> Any:
    return json.loads(Path("trace/timeline.json").read_text())


def spans() -> list[StageSpan]:
    """Those in the trace file, as the engine had them."""
    return [
        StageSpan(
            event["tid"] - 1,
            event["args"]["micro-batch"],
            event["args"]["call"],
            event["cat"],
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
        )
        for event in trace()["traceEvents"]
        if event["ph"] == "X"
    ]


def of(kind: Kind, found: list[StageSpan]) -> dict[tuple[int, int], StageSpan]:
    """By stage and micro-batch: from the first to the last moment."""
    chosen: dict[tuple[int, int], StageSpan] = {}
    for span in sorted((s for s in found if s.kind == kind), key=lambda span: span.start):
        first = chosen.setdefault((span.stage, span.chunk), span)
        chosen[span.stage, span.chunk] = replace(first, end=span.end)
    if kind == "forward":
        assert len(chosen) == sum(span.kind == kind for span in found)
    return chosen


RECOMPUTED = {"never": 0, "except_last": 3, "always": 4}


@pytest.mark.parametrize(("devices", "per_device"), [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("checkpoint", RECOMPUTED)
def test_trace_has_every_task_once_and_in_order(
    devices: int, per_device: int, checkpoint: str
) -> None:
    options = {"checkpoint": checkpoint, "stages_per_device": per_device}
    fit(Deep(), devices, chunks=4, defer_weight_gradients=True, **options)
    stages = devices * per_device
    found = spans()
    forward, backward = of("forward", found), of("backward", found)
    again = {(s.stage, s.chunk): s for s in found if s.kind == "recompute"}
    everything = set(itertools.product(range(stages), range(4)))
    assert forward.keys() == backward.keys() == everything
    recomputed = range(RECOMPUTED[checkpoint])
    assert again.keys() == set(itertools.product(range(stages), recomputed))

    rounding = 1e-9
    for device in range(devices):
        own = [s for s in found if s.stage % devices == device]
        own.sort(key=lambda span: span.start)
        for before, after in itertools.pairwise(own):
            assert before.end <= after.start + rounding
    for stage, chunk in everything:
        if stage > 0:
            assert forward[stage - 1, chunk].end <= forward[stage, chunk].start + rounding
            assert backward[stage, chunk].end <= backward[stage - 1, chunk].start + rounding
        assert forward[stages - 1, 3].end <= backward[stage, chunk].start + rounding
    weights = of("weights", found)
    assert weights.keys() == everything
    for task, span in weights.items():
        assert backward[task].end <= span.start + rounding
    for stage, chunk in again:
        assert backward[stage, chunk].start <= again[stage, chunk].start + rounding


def test_trace_names_its_stages_and_says_how_well_they_were_used() -> None:
    fit(Deep(), 3, chunks=4)
    content = trace()
    threads = {
        event["tid"]: event["args"]["name"]
        for event in content["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert threads == {1: "stage 0 (cpu)", 2: "stage 1 (cpu)", 3: "stage 2 (cpu)"}
    for event in content["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert event.keys() >= {"name", "pid", "tid", "args"}
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    about = content["otherData"]
    measured = PipelineTimeline.of(3, [4], spans())
    assert about["efficiency"] == pytest.approx(measured.efficiency)
    assert about["seconds"] == pytest.approx(measured.seconds)
    assert 0 < about["efficiency"] <= 1
    assert about["ideal"] == 4 / 6
    assert about["step"] == 4


def by_hand() -> PipelineTimeline:
    """Two stages and two micro-batches: 9 of 16 seconds are work."""
    tasks: list[tuple[int, int, Kind, float, float]] = [
        (0, 0, "forward", 10, 11),
        (0, 1, "forward", 11, 12),
        (1, 0, "forward", 11, 12),
        (1, 1, "forward", 12, 13),
        (1, 1, "backward", 14, 15),
        (1, 0, "recompute", 15, 15.5),
        (1, 0, "backward", 15.5, 16),
        (0, 1, "backward", 15, 16),
        (0, 0, "backward", 16, 18),
    ]
    shuffled = reversed([StageSpan(s, c, 0, kind, start, end) for s, c, kind, start, end in tasks])
    return PipelineTimeline.of(2, [2], shuffled)


def test_efficiency_of_known_spans() -> None:
    timeline = by_hand()
    assert timeline.spans[0] == StageSpan(0, 0, 0, "forward", 0, 1)
    assert (timeline.seconds, timeline.busy) == (8, 9)
    assert timeline.efficiency == 9 / 16
    assert timeline.ideal == 2 / 3
    assert PipelineTimeline.of(4, [8], []).efficiency == 0
    # Where each of two devices has two stages, it waits for half as long.
    assert PipelineTimeline.of(4, [8], [], 2).ideal == 8 / 8.5
    assert replace(timeline, stages_per_device=2).efficiency == 9 / 8
    # Where a third of the work is put off, nobody waits for that.
    later = StageSpan(1, 0, 0, "weights", 18, 19)
    assert PipelineTimeline.of(2, [2], [*timeline.spans, later]).ideal == 2 / (2 + 2 / 3)
    # Each call of the module has a bubble of its own.
    assert PipelineTimeline.of(2, [2, 2], []).ideal == 4 / 6


def test_stages_that_are_chosen_in_the_step_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "NUMBERS", (2,))
    strategy = PipelineStrategy(trace_dir="trace", chunks=4, stages_per_device="auto")
    trainer = boring.trainer(strategy, 2, max_steps=1, max_epochs=-1, limit_val_batches=0)
    trainer.fit(Deep(), datamodule=boring.Blobs(8))
    assert of("backward", spans()).keys() == set(itertools.product(range(4), range(4)))


@pytest.mark.slow
def test_only_the_first_of_several_processes_is_traced() -> None:
    strategy = PipelineDDPStrategy(stages=2, chunks=2, trace_dir="trace")
    trainer = boring.trainer(strategy, 4, max_steps=6, max_epochs=-1)
    trainer.fit(Deep(), datamodule=boring.Blobs(8))
    assert sorted(path.name for path in Path("trace").iterdir()) == FILES
    assert of("backward", spans()).keys() == set(itertools.product(range(2), range(2)))


def test_pictures_show_stages_numbers_and_title(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    file.write_text(json.dumps(chrome_trace(by_hand(), ["first", "second"], 7)))
    chart = report.read(file)
    assert chart.stages == ["first", "second"]
    assert chart.title == (
        "Training step 7: 2 stages × 2 micro-batches, 8.00 s",
        "measured efficiency 56.2%, bubble 43.8% (even stages without overhead: 66.7%)",
    )
    drawn = report.draw(file)
    assert [picture.name for picture in drawn] == ["timeline.png", "timeline.html"]
    png, html = drawn
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert 5_000 < png.stat().st_size < 100_000
    page = html.read_text()
    assert not re.search(r"<script[^>]+src=", page), "needs another file"
    for words in ("Training step 7", "second", "recompute", "backward of micro-batch"):
        assert words in page


def test_files_of_a_run() -> None:
    fit(Deep())
    assert sorted(path.name for path in Path("trace").iterdir()) == FILES


@pytest.mark.parametrize(("steps", "measured"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_fourth_step_is_measured_or_the_last(steps: int, measured: int) -> None:
    fit(Deep(), steps=steps)
    assert trace()["otherData"]["step"] == measured


def test_trace_is_written_when_the_step_is_over() -> None:
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, *_: Any) -> None:
            seen.append(Path("trace/timeline.json").exists())

    fit(Deep(), steps=6, callbacks=[Looks()])
    assert seen == [False] * 4 + [True] * 2


def test_steps_in_which_chunks_are_tried_do_not_count() -> None:
    trainer = boring.trainer(
        PipelineStrategy(chunks="auto", trace_dir="trace"), 2, max_steps=18, max_epochs=-1
    )
    trainer.fit(Deep(), datamodule=boring.Blobs(16))
    # 1, 2, 4 and 8 for each stage, three times each, and then the fourth.
    assert trace()["otherData"]["step"] == 16


def test_all_calls_of_a_step_are_in_the_trace() -> None:
    class Twice(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.net(batch[0])
            return super().training_step(batch, batch_idx)

    fit(Twice(), chunks=2)
    found = spans()
    assert trace()["otherData"]["micro-batches"] == [2, 2]
    assert {(s.call, s.kind) for s in found} == {(0, "forward"), (1, "forward"), (1, "backward")}
    assert max(s.end for s in found if s.call == 0) <= min(s.start for s in found if s.call == 1)


def test_a_step_that_computes_nothing_is_passed_over() -> None:
    class Skips(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    fit(Skips(), steps=3)
    assert trace()["otherData"]["step"] == 3
    fit(Skips(), steps=6)
    assert trace()["otherData"]["step"] == 5


def test_manual_optimisation_is_traced() -> None:
    class Manual(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    fit(Manual(), chunks=2)
    assert of("backward", spans()).keys() == set(itertools.product(range(2), range(2)))


def test_tracing_changes_no_result() -> None:
    traced, plain = Deep("adam"), Deep("adam")
    fit(traced, steps=6, checkpoint="always")
    strategy = PipelineStrategy(checkpoint="always")
    boring.trainer(strategy, 2, max_steps=6).fit(plain, datamodule=boring.Blobs(8))
    boring.assert_same_weights(traced, plain, tolerance=0)


def test_nothing_is_recorded_without_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(recording.Recording, "__init__", refuse)
    boring.trainer(PipelineStrategy(), 2, max_steps=6).fit(Deep(), datamodule=boring.Blobs(8))
    assert not list(Path().iterdir())


def test_nothing_is_recorded_after_the_step_nor_in_evaluation() -> None:
    made: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert trainer.strategy._pipeline.recording is None

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            made.append(trainer.strategy._trace._steps)

    trainer = fit(Deep(), steps=6, callbacks=[Counts()])
    assert made == [0, 1, 2, 3, 4, 4]
    (Path("trace") / "timeline.json").unlink()
    trainer.validate(Deep(), datamodule=boring.Blobs(8), verbose=False)
    assert not Path("trace/timeline.json").exists()


def test_a_second_fit_is_measured_anew() -> None:
    trainer = fit(Deep(), steps=5)
    Path("trace/timeline.json").unlink()
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(Deep(), datamodule=boring.Blobs(8))
    assert trace()["otherData"]["step"] == 2


@pytest.mark.parametrize(("fails_at", "written"), [(3, False), (4, True)])
def test_a_broken_step_is_not_shown(fails_at: int, written: bool) -> None:
    model = Failing()
    model.fails_at = fails_at
    with pytest.raises(RuntimeError, match="broken step"):
        fit(model, steps=6)
    assert Path("trace/timeline.json").exists() == written


@pytest.mark.parametrize(
    ("libraries", "left"),
    [
        (["matplotlib", "plotly"], ["timeline.json"]),
        (["plotly"], ["timeline.json", "timeline.png"]),
        (["matplotlib"], ["timeline.html", "timeline.json"]),
    ],
)
def test_without_the_extra_there_is_less_and_a_word_about_it(
    libraries: list[str], left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, None)
    words = rf"{' and '.join(libraries)} not installed.*pip install 'lightning_mgpu\[report\]'"
    with pytest.warns(UserWarning, match=words):
        fit(Deep())
    assert sorted(path.name for path in Path("trace").iterdir()) == left
    monkeypatch.undo()
    report.draw("trace/timeline.json")
    assert sorted(path.name for path in Path("trace").iterdir()) == FILES


def test_a_picture_that_cannot_be_drawn_costs_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "draw", fail)
    trainer = fit(Deep(), steps=7)
    assert trainer.global_step == 7
    assert "The timeline could not be written to trace/timeline.json." in caplog.text
    assert "No space left on device" in caplog.text


def test_a_directory_that_cannot_be_made_is_refused_before_training() -> None:
    Path("taken").write_text("")
    trainer = boring.trainer(PipelineStrategy(trace_dir="taken"), 2)
    with pytest.raises(MisconfigurationException, match=r"trace_dir='taken'.*Choose a directory"):
        trainer.fit(Deep(), datamodule=boring.Blobs(8))
    assert trainer.global_step == 0


class FakeEvent:
    """Each is recorded two milliseconds after the one before, whatever the host's clock says."""

    times = itertools.count(100.0, 2.0)

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time: float | None = None
        self.over = False

    def record(self) -> None:
        self.time = next(self.times)

    def synchronize(self) -> None:
        self.over = True

    def elapsed_time(self, later: "FakeEvent") -> float:
        assert self.over
        assert later.over
        assert self.time is not None
        assert later.time is not None
        return later.time - self.time


def test_times_on_a_gpu_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = torch.device("cuda", 1)
    taken = recording.Recording([device])
    assert set(entered) == {device}
    call = taken.begin_call(1, 1)
    for kind in ("forward", "backward"):
        with taken.recorded(0, 0, call, kind):
            pass
    timeline = taken.timeline()
    assert [span.end - span.start for span in timeline.spans] == pytest.approx([2e-3, 2e-3])
    assert timeline.seconds == pytest.approx(6e-3)


@pytest.mark.gpu
def test_time_on_a_gpu_includes_what_has_only_been_started() -> None:
    device = torch.device("cuda", 0)
    taken = recording.Recording([device])
    matrix = torch.randn(4096, 4096, device=device)
    call = taken.begin_call(1, 1)
    with torch.cuda.device(device), taken.recorded(0, 0, call, "forward"):
        for _ in range(20):
            matrix = matrix @ matrix
    (span,) = taken.timeline().spans
    assert span.end - span.start > 0
