"""A sweep: from options and overrides to the best trial."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from lightning_mgpu.errors import ConfigError, SweepFailedError
from lightning_mgpu.ray.sweep.custom import add_custom
from lightning_mgpu.ray.sweep.job import Job
from lightning_mgpu.ray.sweep.memory import HALVINGS, batch_size, check_shrinkable, compose
from lightning_mgpu.ray.sweep.objectives import read_objectives
from lightning_mgpu.ray.sweep.options import check_options, check_space
from lightning_mgpu.ray.sweep.records import Records, TrialRecord
from lightning_mgpu.ray.sweep.results import job_command, resume_command, write_results
from lightning_mgpu.ray.sweep.space import (
    Space,
    check_searchable,
    enumerate_grid,
    parse_space,
)

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

__all__: list[str] = []

log = logging.getLogger(__name__)

_SPACE = "search_space.yaml"
_SAMPLES = 10


@dataclass
class Sweep:
    """A sweep that has been checked and can start.

    Attributes:
        directory: ``hydra.sweep.dir``, or that of the sweep which is resumed.
        num_samples: How many trials there are in all.
    """

    job: Job
    options: "RayTuneSweeperConf"
    space: Space
    directory: Path
    num_samples: int
    records: Records

    @classmethod
    def prepare(cls, job: Job, options: "RayTuneSweeperConf", arguments: Sequence[str]) -> "Sweep":
        """Read the search space, and see that a trial can be composed and its files written."""
        check_options(options)
        space = parse_space(options.params, arguments, job.config_loader)
        if options.custom_search_space is not None:
            add_custom(space, options.custom_search_space, job.config)
        if options.search_alg.name != "grid":  # a grid of nothing is one job, as in Hydra
            check_searchable(space)
        check_space(options, space)
        directory = Path(options.resume or job.config.hydra.sweep.dir).absolute()
        first, *others = read_objectives(options)
        takes_best = options.report != "last" and not others  # else of which report?
        records = Records(*first, takes_best, others=tuple(others))
        sweep = cls(job, options, space, directory, _num_samples(options, space), records)
        cfg = job.compose(space.example(), 0, directory)  # raises what Hydra has against it
        if options.on_oom == "retry_smaller":
            check_shrinkable(cfg)
        sweep._claim_directory()
        return sweep

    def describe(self, number: int, values: dict[str, Any]) -> tuple[list[str], Path]:
        """Overrides and directory of the trial that has these values."""
        overrides, cfg = compose(self.job, self.space, values, number, self.directory)
        return overrides, self.job.output_dir(cfg)

    def smaller(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """The values of a trial once more, with its batch halved; `None` if that cannot be."""
        _, cfg = compose(self.job, self.space, values, 0, self.directory)
        if batch_size(cfg) == 1:
            return None
        return {**values, HALVINGS: values.get(HALVINGS, 0) + 1}

    def _claim_directory(self) -> None:
        """Write down what is searched; a resumed sweep must search the same."""
        path = self.directory / _SPACE
        identity = {
            "metric": self.options.metric,
            "mode": self.options.mode,
            "search_alg": self.options.search_alg.name,
            "fixed": self.space.fixed,
            "search": str(self.space).splitlines(),
        }
        if self.options.resume is None:
            if path.exists():
                raise ConfigError(
                    f"hydra.sweep.dir={self.directory}: holds a sweep already. Go on with it by"
                    f" hydra.sweeper.resume={self.directory}, or choose another directory."
                )
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(identity, sort_keys=False))
            OmegaConf.save(self.job.config, self.directory / "multirun.yaml")
            return
        if not path.exists():
            raise ConfigError(f"hydra.sweeper.resume={self.options.resume}: holds no sweep.")
        before = yaml.safe_load(path.read_text())
        for name, value in identity.items():
            if before[name] != value:
                raise ConfigError(
                    f"hydra.sweeper.resume={self.options.resume}: was a sweep with {name}"
                    f" {before[name]}, now it is {value}. Give the same arguments as before, or"
                    " start a new sweep."
                )


def run(job: Job, options: "RayTuneSweeperConf", arguments: Sequence[str]) -> None:
    """Search, show how it goes, and write the results to ``hydra.sweep.dir``.

    Raises:
        ConfigError: The options ask for what cannot be; nothing was started.
        SweepFailedError: Not one trial has a result.
    """
    sweep = Sweep.prepare(job, options, arguments)
    from lightning_mgpu.ray.sweep.tuning import tune  # Ray, now that there is something to run

    was_interrupted, why_early = tune(sweep)
    path = write_results(sweep.records, sweep.directory)
    if was_interrupted:
        log.warning(
            "Interrupted. Results so far: %s\nGo on with: %s",
            _relative(path),
            resume_command(sweep.directory),
        )
        sys.exit(128 + signal.SIGINT)
    page = _draw(sweep) if options.report is not False else None
    if why_early is not None:
        _say_that_early(sweep, why_early)
    _conclude(sweep.records, path, page)


def _draw(sweep: Sweep) -> Path | None:
    """The report's page, if it can be drawn; a sweep is worth more than its pictures."""
    from lightning_mgpu.report.sweep.command import draw, missing

    again = f"python -m lightning_mgpu mode=report sweep={sweep.directory}"
    if missing():
        log.info(
            "For a report with pictures: pip install 'lightning_mgpu[report]', then\n  %s", again
        )
        return None
    try:
        return draw(sweep.directory)[0]
    except Exception as error:
        line = " ".join(str(error).split())
        log.warning(
            "The report could not be drawn (%s: %s). Try again by: %s",
            type(error).__name__,
            line,
            again,
        )
        return None


def _say_that_early(sweep: Sweep, why: str) -> None:
    """Why there may be fewer results than were asked for."""
    unfinished = sweep.records.count("unfinished")
    missing = sweep.num_samples - len(sweep.records.trials)
    log.warning(
        "Ended early, since %s: %d trials unfinished, %d not begun. Go on with: %s",
        why,
        unfinished,
        missing,
        resume_command(sweep.directory),
    )


def _conclude(records: Records, path: Path, page: Path | None) -> None:
    """The last lines: the best trial, and how to run it again."""
    failed = [record for record in records.ordered() if record.status == "failed"]
    if failed:
        log.warning(
            "%d of %d trials failed; the first: trial %d, %s (see %s).",
            len(failed),
            len(records.trials),
            failed[0].number,
            failed[0].reason,
            _relative(Path(failed[0].directory)),
        )
    files = " and ".join(_relative(file) for file in (path, page) if file is not None)
    best = records.front()
    if not best:
        raise SweepFailedError(
            f"No trial has a result: {len(failed)} of {len(records.trials)} failed. The first"
            f" reason: {failed[0].reason if failed else 'none was run'}. See {files}."
        )
    lines = [line for record in best for line in _praise(records, record)]
    lines.append(f"  all results: {_relative(path)}")
    if page is not None:
        lines.append(f"  report: {_relative(page)}")
    log.info("\n".join(lines))


def _praise(records: Records, record: TrialRecord) -> list[str]:
    values = (records.values(record) or {}).items()
    worth = " ".join(f"{name}={value:.6g}" for name, value in values)
    lines = [f"Best: trial {record.number}, {worth}"]
    lines.append(f"  run it alone: {job_command(record.overrides)}")
    if record.checkpoint is not None:
        lines.append(f"  checkpoint: {_relative(Path(record.checkpoint))}")
    return lines


def _num_samples(options: "RayTuneSweeperConf", space: Space) -> int:
    if options.search_alg.name != "grid":
        return options.num_samples or _SAMPLES
    points = len(enumerate_grid(space))
    return min(options.num_samples or points, points)


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
