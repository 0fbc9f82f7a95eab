"""Write all trials of a sweep as a table, for pandas and spreadsheets."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning_mgpu.sweep.space.space import encode
from lightning_mgpu.sweep.store.records import Records, TrialRecord

TABLE = "trials.csv"
"""Its name, in the directory of a sweep."""


def write_table(records: Records, directory: Path) -> Path:
    """Write a row for each trial, by number.

    The columns are those of the results: `value`, or the name of each metric if there are several,
    then ``params.<name>`` and ``metrics.<name>``. What a trial has not is empty; lists and dicts
    are written as on the command line.
    """
    rows = [_row(records, record) for record in records.ordered()]
    # those that all trials have come first
    order = ("", "params.", "metrics.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: max(n for n, start in enumerate(order) if name.startswith(start)))
    path = directory / TABLE
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
    return path


def _row(records: Records, record: TrialRecord) -> dict[str, Any]:
    setting, values = records.setting(record), records.values(record)
    found = {} if values is None else values if records.others else {"value": records.value(record)}
    return {
        "number": record.number,
        "status": record.status,
        "ended_by": record.ended_by,
        **found,
        "reports": len(record.history),
        "epoch": setting.epoch,
        "seconds": round(record.seconds, 2),
        "directory": record.directory,
        "checkpoint": setting.checkpoint,
        "reason": record.reason,
        **{f"params.{name}": _cell(value) for name, value in setting.values.items()},
        **{f"metrics.{name}": value for name, value in record.metrics.items()},
    }


def _cell(value: Any) -> Any:
    return encode(value) if isinstance(value, (list, tuple, dict)) else value
