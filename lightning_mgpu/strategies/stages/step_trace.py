"""Record one training step of a pipeline and write it to files."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.profile.recording import Recording
from lightning_mgpu.engine.pipeline.profile.timeline import PipelineTimeline, StageSpan
from lightning_mgpu.timeline import drawing as report

log = logging.getLogger(__name__)

# The first steps allocate memory and start threads.
_WARM_STEP = 4
_FILE = "timeline.json"


class StepTrace:
    """Record the fourth training step, or the last of a shorter run, and write it to files.

    While numbers of micro-batches are being tried, steps do not count.

    Args:
        directory: Where to; made if need be.
        pipeline: What to measure.

    Raises:
        MisconfigurationException: The directory cannot be made.
    """

    def __init__(self, directory: Path, pipeline: Pipeline) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(
                f"`trace_dir={str(directory)!r}`: {error}. Choose a directory that can be created."
            ) from error
        lacking = report.missing()
        if lacking:
            rank_zero_warn(
                f"`trace_dir={str(directory)!r}`: {' and '.join(lacking)} not installed, so"
                " pictures (PNG, HTML) beside the JSON trace will be missing. Install with"
                " `pip install 'lightning_mgpu[report]'`."
            )
        self._path, self._pipeline = directory / _FILE, pipeline
        self._measured: tuple[int, Recording] | None = None
        self._steps = self._counted = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a training step; its backward may come later, before the next."""
        if self._counted == _WARM_STEP:
            self.write()
            yield
            return
        recording = self._pipeline.recording = Recording(
            self._pipeline.devices, self._pipeline.stages_per_device
        )
        try:
            yield
        finally:
            self._pipeline.recording = None
        self._steps += 1
        if recording.calls:
            self._measured = self._steps, recording
            self._counted += self._pipeline.chunks.settled

    def write(self) -> None:
        """Write the last recording, unless it has been written."""
        if self._measured is None:
            return
        (step, recording), self._measured = self._measured, None
        timeline = recording.timeline()
        names = [f"stage {i} ({device})" for i, device in enumerate(self._pipeline.devices)]
        try:
            self._path.write_text(json.dumps(chrome_trace(timeline, names, step)))
            pictures = report.draw(self._path)
        except Exception:  # no picture is worth a run
            log.warning("The timeline could not be written to %s.", self._path, exc_info=True)
            return
        files = ", ".join(path.name for path in (self._path, *pictures))
        rank_zero_info(
            f"Timeline of training step {step}: efficiency {timeline.efficiency:.1%} (at"
            f" best {timeline.ideal:.1%}); in {self._path.parent}: {files}"
        )


def chrome_trace(timeline: PipelineTimeline, names: list[str], step: int) -> dict[str, Any]:
    """A timeline in the trace event format, which ui.perfetto.dev and chrome://tracing show.

    Args:
        timeline: The timeline.
        names: Of the stages, each a thread.
        step: The number of the training step.
    """
    events = [_about("process_name", 1, name=f"pipeline, training step {step}")]
    for thread, name in enumerate(names, start=1):
        events.append(_about("thread_name", thread, name=name))
        events.append(_about("thread_sort_index", thread, sort_index=thread))
    return {
        "traceEvents": [*events, *map(_complete_event, timeline.spans)],
        "displayTimeUnit": "ms",
        "otherData": {
            "step": step,
            "stages": timeline.stages,
            "micro-batches": timeline.chunks,
            "seconds": timeline.seconds,
            "efficiency": timeline.efficiency,
            "ideal": timeline.ideal,
        },
    }


def _about(what: str, thread: int, **args: Any) -> dict[str, Any]:
    # Not 0, which stands for the idle task.
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": args}


def _complete_event(span: StageSpan) -> dict[str, Any]:
    return {
        "name": f"{span.kind} {span.chunk}",
        "cat": span.kind,
        "ph": "X",
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "pid": 1,
        "tid": span.stage + 1,
        "args": {"stage": span.stage, "micro-batch": span.chunk, "call": span.call},
    }
