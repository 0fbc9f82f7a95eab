"""A sweep before it starts: checked options, search space and directory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_mgpu.errors import ConfigError
from lightning_mgpu.sweep.job.job import Job
from lightning_mgpu.sweep.job.oom_retry import HALVINGS, batch_size, check_shrinkable, compose
from lightning_mgpu.sweep.job.submitted import name_of
from lightning_mgpu.sweep.settings.nodes import is_grid
from lightning_mgpu.sweep.settings.options import check_launcher, check_options, check_space
from lightning_mgpu.sweep.space.conditions import add_conditions
from lightning_mgpu.sweep.space.custom import add_custom
from lightning_mgpu.sweep.space.objectives import read_objectives
from lightning_mgpu.sweep.space.space import (
    Space,
    check_searchable,
    enumerate_grid,
    parse_space,
)
from lightning_mgpu.sweep.store.records import Records
from lightning_mgpu.sweep.store.results import of_the_cluster, relative

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

log = logging.getLogger(__name__)

SPACE = "search_space.yaml"
"""What is searched, in the directory of a sweep."""
_SAMPLES = 10


@dataclass
class PreparedSweep:
    """A sweep that has been checked and can start.

    Attributes:
        directory: ``hydra.sweep.dir``, or that of the sweep which is resumed.
        num_samples: How many trials there are in all.
        reports: How many reports a whole trial makes, as far as the config tells.
    """

    job: Job
    options: "RayTuneSweeperConf"
    space: Space
    directory: Path
    num_samples: int
    records: Records
    reports: int | None = None
    _has_told: bool = False

    @classmethod
    def prepare(
        cls, job: Job, options: "RayTuneSweeperConf", arguments: Sequence[str]
    ) -> "PreparedSweep":
        """Read the search space, and check that a trial can be composed."""
        check_options(options)
        check_launcher(job.config)
        space = parse_space(options.params, arguments, job.config_loader)
        if options.custom_search_space is not None:
            add_custom(space, options.custom_search_space, job.config)
        add_conditions(space, options.conditions)
        if not is_grid(options):  # a grid of nothing is one job, as in Hydra
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
        sweep.reports = _reports(cfg, options.every_n_epochs)
        return sweep

    def describe(self, number: int, values: dict[str, Any]) -> tuple[list[str], Path]:
        """Overrides and directory of the trial with these values."""
        overrides, cfg = compose(self.job, self.space, values, number, self.directory)
        wanted = self.directory / self.job.subdir(cfg)
        directory = self.job.output_dir(cfg)
        if directory != wanted and not self._has_told:
            self._has_told = True
            log.warning(
                "hydra.sweep.subdir is %s for trial %d, which another trial has or no directory"
                " can be called. Its files are in %s, and so with other trials.",
                relative(wanted),
                number,
                relative(directory),
            )
        return overrides, directory

    def smaller(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """Values of a trial with its batch halved; `None` if that is impossible."""
        _, cfg = compose(self.job, self.space, values, 0, self.directory)
        if batch_size(cfg) == 1:
            return None
        return {**values, HALVINGS: values.get(HALVINGS, 0) + 1}

    def claim_directory(self) -> None:
        """Write the search space to the directory; a resumed sweep must have the same.

        Raises:
            ConfigError: The directory holds a sweep that is not resumed, or another one.
        """
        path = self.directory / SPACE
        identity = {
            "metric": self.options.metric,
            "mode": self.options.mode,
            "search_alg": self.options.search_alg.name,
            "fixed": [given for given in self.space.fixed if not of_the_cluster(given)],
            "search": str(self.space).splitlines(),
        }
        if self.options.resume is None:
            if holds_sweep(self.directory):
                raise ConfigError(
                    f"hydra.sweep.dir={name_of(self.directory)}: already holds a sweep. Resume"
                    f" it with hydra.sweeper.resume={name_of(self.directory)}, or choose"
                    " another directory."
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


def holds_sweep(directory: Path) -> bool:
    """Return whether a directory is that of a sweep."""
    return (directory / SPACE).exists()


def _num_samples(options: "RayTuneSweeperConf", space: Space) -> int:
    if not is_grid(options):
        return options.num_samples or _SAMPLES
    points = len(enumerate_grid(space))
    return min(options.num_samples or points, points)


def _reports(cfg: DictConfig, every_n_epochs: int) -> int | None:
    """Reports of a trial that trains all of ``trainer.max_epochs``."""
    try:
        epochs = OmegaConf.select(cfg, "trainer.max_epochs")
    except OmegaConfBaseException:  # of the job's own, which it may never read
        return None
    return max(1, epochs // every_n_epochs) if isinstance(epochs, int) and epochs > 0 else None
