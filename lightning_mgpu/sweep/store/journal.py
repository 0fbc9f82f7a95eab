"""Write the events of a sweep to its journal, for the report."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_mgpu.sweep.report.reader import JOURNAL
from lightning_mgpu.sweep.space.space import Choice, Dimension, Space
from lightning_mgpu.sweep.store.records import FINAL, Records, TrialRecord
from lightning_mgpu.sweep.store.results import job_command, plain

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

log = logging.getLogger(__name__)


class Journal:
    """File with a line for each event; a resumed sweep appends to it.

    A disk that is full costs the report, and not the sweep.

    Args:
        directory: The sweep's.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL
        self._file: TextIO | None = None
        self._hosts: dict[int, str] = {}  # on which each running trial is

    def __enter__(self) -> "Journal":
        try:
            is_cut_short = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            if is_cut_short:  # a line of a sweep that was killed
                self._file.write("\n")
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self, options: "RayTuneSweeperConf", space: Space, records: Records) -> None:
        """Record that the sweep starts or resumes."""
        self._write(
            "sweep",
            metric=records.metric,
            mode=records.mode,
            takes_best=records.takes_best,
            search_alg=options.search_alg.name,
            scheduler=options.scheduler.name,
            dimensions=[_described(name, one) for name, one in space.dimensions.items()],
        )

    def start(self, record: TrialRecord, worker: str) -> None:
        """Record that a trial starts, resumes after a pause, or restarts."""
        self._hosts.pop(record.number, None)
        self._write(
            "start",
            trial=record.number,
            worker=worker,
            params=plain(record.values),
            command=job_command(record.overrides),
            directory=os.path.relpath(record.directory, self._path.parent),
        )

    def report(self, record: TrialRecord, result: dict[str, Any]) -> None:
        """Record a report of a trial, already contained in `record`."""
        host = str(result.get("hostname", ""))
        more = {} if self._hosts.get(record.number) == host else {"host": host}
        self._hosts[record.number] = host
        self._write(
            "report",
            trial=record.number,
            epoch=plain(result.get("epoch")),
            metrics=record.metrics,
            **more,
            **({"final": True} if result.get(FINAL) else {}),
        )

    def pause(self, number: int) -> None:
        """Record that a trial waits for others."""
        self._write("pause", trial=number)

    def retry(self, record: TrialRecord) -> None:
        """Record that a trial has failed and will be retried."""
        self._write("retry", trial=record.number, reason=record.reason)

    def end(self, record: TrialRecord) -> None:
        """Record that a trial has ended."""
        self._write("end", trial=record.number, status=record.status, reason=record.reason)

    def _write(self, event: str, **about: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": time.time(), **about}, default=str)
        try:
            self._file.write(line + "\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        log.warning("%s cannot be written (%s): the sweep will have no report.", self._path, error)


def _described(name: str, dimension: Dimension) -> dict[str, Any]:
    if isinstance(dimension, Choice):
        return {"name": name, "choices": plain(dimension.values)}
    return {"name": name, **vars(dimension)}
