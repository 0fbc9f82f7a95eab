"""Show a plan as a table, and write it to files."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from lightning_mgpu.format import duration, readable_bytes
from lightning_mgpu.plan.predict import Plan, Row


def summary(plan: Plan) -> Group:
    """Table of the fastest row for each number of devices, with notes."""
    profile = plan.profile
    title = (
        f"{len(profile.names)} layers, batches of {profile.batch}; the fastest for each number"
        " of devices:"
    )
    made = Table(
        *("devices", "stages", "replicas", "chunks", "checkpoint"),
        *("step", "samples/s", "bubble", "memory"),
        box=None,
        padding=(0, 1, 0, 0),
    )
    for column in made.columns:
        column.justify = "left" if column.header == "checkpoint" else "right"
        column.no_wrap = True
    for row in plan.best():
        made.add_row(*_cells(row))
    return Group(title, made, *(f"Left out: {reason}." for reason in plan.left_out))


def write(plan: Plan, directory: Path) -> dict[str, Path]:
    """Write all rows, and the measurements behind them.

    Returns:
        The files, each by what it is.
    """
    rows = [asdict(row) for row in plan.rows]
    tabular, whole = directory / "plan.csv", directory / "plan.json"
    with tabular.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({name: _flat(value) for name, value in row.items()} for row in rows)
    content = {"measured": _measured(plan), "left_out": plan.left_out, "rows": rows}
    whole.write_text(json.dumps(content, indent=1) + "\n")
    return {"plan": tabular, "plan with its measurements": whole}


def _cells(row: Row) -> list[str]:
    return [
        *map(str, (row.devices, row.stages, row.replicas, row.chunks, row.checkpoint)),
        duration(row.seconds),
        f"{row.samples_per_second:.4g}",
        f"{row.bubble:.0%}",
        readable_bytes(row.memory),
    ]


def _measured(plan: Plan) -> dict[str, Any]:
    profile = plan.profile
    return {
        "batch": profile.batch,
        "layers": [
            {"name": name, **asdict(weights)}
            for name, weights in zip(profile.names, profile.weights, strict=True)
        ],
        "samples": [
            {
                "chunks": sample.chunks,
                "forward": list(sample.forward),
                "backward": list(sample.backward),
                "overhead": list(sample.overhead),
                "own": sample.own,
            }
            for sample in profile.samples
        ],
    }


def _flat(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return value
