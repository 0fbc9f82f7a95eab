"""Read a sweep's journal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.report.model import Dimension, Report, Stretch, SweepHistory, Trial

JOURNAL = "journal.jsonl"
"""The file, a JSON object in each line, in the directory of a sweep."""


def read(directory: Path) -> SweepHistory:
    """Read the sweep in a directory: finished, interrupted or running.

    Raises:
        ConfigError: There is none.
    """
    path = directory / JOURNAL
    if not path.is_file():
        raise ConfigError(
            f"sweep={directory}: there is no {JOURNAL}. Name the directory of a sweep by"
            " hydra/sweeper=ray_tune (hydra.sweep.dir), such as multirun/2026-01-31/12-00-00."
        )
    reader = _Reader()
    for event in _events(path):
        reader.take(event)
    if reader.about is None:
        raise ConfigError(f"sweep={directory}: {JOURNAL} holds no sweep; it may be damaged.")
    return reader.sweep(directory)


def _events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short where the sweep was killed
            if isinstance(event, dict) and "event" in event:
                yield event


class _Reader:
    """State of the sweep after the events so far.

    Attributes:
        about: The latest of those that begin or resume the sweep.
    """

    def __init__(self) -> None:
        self.about: dict[str, Any] | None = None
        self._trials: dict[int, Trial] = {}
        self._open: dict[int, Stretch] = {}
        self._again: set[int] = set()  # begun once more, and nothing reported since
        self._settings: dict[tuple[int, int], tuple[dict[str, Any], str]] = {}  # by stretch
        self._sessions: list[float] = []
        self._now = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """Process the next event."""
        if event["event"] == "sweep":
            self._close_all()  # what was under way when the sweep was ended
            self._sessions.append(event["time"])
            self.about = event
        self._now = max(self._now, float(event["time"]))
        if event["event"] == "start":
            self._start(event)
        elif "trial" in event and event["trial"] in self._trials:
            getattr(self, f"_{event['event']}")(self._trials[event["trial"]], event)

    def sweep(self, directory: Path) -> SweepHistory:
        """The sweep so far."""
        self._close_all()
        about = self.about
        assert about is not None
        found = SweepHistory(
            directory=directory,
            metric=_first(about["metric"]),
            mode=_first(about["mode"]),
            takes_best=about["takes_best"],
            search_alg=about["search_alg"],
            scheduler=about["scheduler"],
            dimensions=[_dimension(one) for one in about["dimensions"]],
            trials=[self._trials[number] for number in sorted(self._trials)],
            sessions=self._sessions,
        )
        for trial in found.trials:
            trial.params, trial.command = self._settings[trial.number, found.stretch(trial)]
        return found

    def _start(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        trial = self._trials.setdefault(number, Trial(number, event["params"]))
        self._close(number, "paused")  # population-based training does not say so
        if trial.params != event["params"]:
            # Goes on from another trial, and what it has reported so far is how it came there.
            trial.params = event["params"]
        elif trial.reports:
            self._again.add(number)
        trial.status, trial.reason = "unfinished", ""
        trial.directory = event.get("directory", "")
        self._settings[number, len(trial.stretches)] = event["params"], event["command"]
        trial.stretches.append(Stretch(self._now, self._now, event["worker"]))
        self._open[number] = trial.stretches[-1]

    def _report(self, trial: Trial, event: dict[str, Any]) -> None:
        epoch = event.get("epoch")
        if trial.number in self._again:
            self._again.remove(trial.number)
            # What it does a second time counts once.
            trial.reports = [r for r in trial.reports if _is_before(r, epoch)]
        if event.get("final"):  # it is worth what it says at its end
            trial.reports = []
        trial.reports.append(Report(epoch, event["metrics"], len(trial.stretches) - 1))
        if trial.stretches and event.get("host"):
            trial.stretches[-1].host = event["host"]

    def _pause(self, trial: Trial, event: dict[str, Any]) -> None:
        self._close(trial.number, "paused")

    def _retry(self, trial: Trial, event: dict[str, Any]) -> None:
        self._close(trial.number, "failed")

    def _end(self, trial: Trial, event: dict[str, Any]) -> None:
        trial.status, trial.reason = event["status"], event.get("reason") or ""
        self._close(trial.number, trial.status)

    def _close(self, number: int, outcome: str) -> None:
        stretch = self._open.pop(number, None)
        if stretch is not None:
            stretch.end, stretch.outcome = self._now, outcome

    def _close_all(self) -> None:
        for number in list(self._open):
            self._close(number, "unfinished")


def _is_before(report: Report, epoch: int | None) -> bool:
    return report.epoch is not None and epoch is not None and report.epoch < epoch


def _first(value: Any) -> Any:
    """First of several metrics."""
    return value[0] if isinstance(value, list) else value


def _dimension(written: dict[str, Any]) -> Dimension:
    choices = written.pop("choices", None)
    return Dimension(choices=None if choices is None else tuple(choices), **written)
