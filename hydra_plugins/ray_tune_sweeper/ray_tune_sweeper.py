"""The plugin that Hydra finds."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf, adopt


class RayTuneSweeper(Sweeper):
    """Runs trials of a job with Ray Tune; the options are `RayTuneSweeperConf`'s."""

    def __init__(self, **_: Any) -> None:
        pass  # the typed options come with the config, in `setup`

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what a sweep needs; called by Hydra."""
        self.hydra_context = hydra_context
        self.config = config
        self._given = (hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Search, and leave the results in ``hydra.sweep.dir``."""
        from lightning_mgpu.sweep.job.job import Job
        from lightning_mgpu.sweep.main import run

        job = Job(*self._given)
        options = OmegaConf.to_object(job.config.hydra.sweeper)
        assert isinstance(options, RayTuneSweeperConf)
        chosen = job.config.hydra.runtime.choices
        options.search_alg = adopt(options.search_alg, chosen.get("hydra/sweeper/search_alg"))
        options.scheduler = adopt(options.scheduler, chosen.get("hydra/sweeper/scheduler"))
        run(job, options, arguments)
