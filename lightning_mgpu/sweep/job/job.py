"""The user's Hydra application, run as one trial's job."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from lightning_mgpu.sweep.job.places import own_subdir

_MOST_AHEAD = 64  # configs; as many as trials may wait, and more


@dataclass
class Job:
    """Compose and run the jobs of trials, from what Hydra passes to a sweeper."""

    context: HydraContext
    task_function: TaskFunction
    config: DictConfig
    _ahead: dict[tuple[str, ...], DictConfig] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": {}}  # a trial composes its own

    @property
    def config_loader(self) -> ConfigLoader:
        """Hydra's config loader."""
        return self.context.config_loader

    def compose(self, overrides: Sequence[str], number: int, sweep_dir: Path) -> DictConfig:
        """Compose the config of job `number`."""
        cfg = self._ahead.pop(tuple(overrides), None)
        if cfg is None:
            cfg = self.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id = f"{cfg.hydra.job.name}_{number}"
            cfg.hydra.job.num = number
            cfg.hydra.sweep.dir = str(sweep_dir)  # as resolved once, with the time of the start
        return cfg

    def compose_ahead(self, overrides: Sequence[str], sweep_dir: Path) -> DictConfig:
        """Compose the config of a job without a number yet, and keep it for `compose`."""
        cfg = self.compose(overrides, 0, sweep_dir)
        if len(self._ahead) < _MOST_AHEAD:
            self._ahead[tuple(overrides)] = cfg
        return cfg

    def subdir(self, cfg: DictConfig) -> str:
        """``hydra.sweep.subdir`` of a composed job, as it is written."""
        HydraConfig.instance().set_config(cfg)
        return str(cfg.hydra.sweep.subdir)

    def output_dir(self, cfg: DictConfig) -> Path:
        """Output directory of a composed job, which no other one has; its config gets it."""
        sweep_dir, wanted = Path(cfg.hydra.sweep.dir), self.subdir(cfg)
        found = own_subdir(sweep_dir, wanted, cfg.hydra.job.num)
        if found != wanted:
            with read_write(cfg.hydra), open_dict(cfg.hydra):
                cfg.hydra.sweep.subdir = found.replace("${", "\\${")  # no interpolation
        return sweep_dir / found

    def run(self, cfg: DictConfig, task: TaskFunction) -> Any:
        """Run a composed job in this process, and return what it returns.

        Args:
            cfg: The job's config.
            task: The user's function, or what calls it.
        """
        setup_globals()
        HydraConfig.instance().set_config(cfg)
        done: JobReturn = run_job(
            hydra_context=self.context,
            task_function=task,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return done.return_value  # or raises what the job raised


def program() -> list[str]:
    """Command that started this application, without arguments."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__")]
    return ["python", sys.argv[0]]
