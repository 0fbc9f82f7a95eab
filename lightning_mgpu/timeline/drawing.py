"""Read and draw a pipeline's trace file.

`draw` makes the pictures of a trace that is there already, as when the extra was not installed.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_mgpu.format import duration
from lightning_mgpu.timeline.gantt import Bar, Chart

__all__ = ["draw", "missing"]

_PNG, _HTML = "matplotlib", "plotly"
"""The libraries that draw."""


def missing() -> list[str]:
    """The libraries of the extra `report` that are not installed."""
    return [library for library in (_PNG, _HTML) if find_spec(library) is None]


def draw(trace: str | Path) -> list[Path]:
    """Draw a trace written by `PipelineStrategy(trace_dir=...)` as PNG and HTML beside it.

    Args:
        trace: The JSON file.

    Returns:
        The pictures; of those, without that for which a library is missing.
    """
    chart, lacking = read(trace), missing()
    drawn: list[Path] = []
    if _PNG not in lacking:
        from lightning_mgpu.timeline import gantt_png

        drawn.append(Path(trace).with_suffix(".png"))
        gantt_png.draw(chart, drawn[-1])
    if _HTML not in lacking:
        from lightning_mgpu.timeline import gantt_html

        drawn.append(Path(trace).with_suffix(".html"))
        gantt_html.draw(chart, drawn[-1])
    return drawn


def read(trace: str | Path) -> Chart:
    """Read a trace file as a chart."""
    content = json.loads(Path(trace).read_text())
    events, about = content["traceEvents"], content["otherData"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    bars = [
        Bar(e["args"]["stage"], e["args"]["micro-batch"], e["cat"], e["ts"] / 1e3, e["dur"] / 1e3)
        for e in events
        if e["ph"] == "X"
    ]
    stages = [name for _, name in sorted(names.items())]
    return Chart(stages, bars, about["seconds"] * 1e3, _title(about))


def _title(about: dict[str, Any]) -> tuple[str, str]:
    chunks, seconds, efficiency = about["micro-batches"], about["seconds"], about["efficiency"]
    calls = f" in {len(chunks)} calls" if len(chunks) > 1 else ""
    return (
        f"Training step {about['step']}: {about['stages']} stages × {sum(chunks)} micro-batches"
        f"{calls}, {duration(seconds)}",
        f"measured efficiency {efficiency:.1%}, bubble {1 - efficiency:.1%}"
        f" (even stages without overhead: {about['ideal']:.1%})",
    )
