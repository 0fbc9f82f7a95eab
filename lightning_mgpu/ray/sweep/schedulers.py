"""Which trials are stopped before their end."""

from typing import TYPE_CHECKING

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf

__all__: list[str] = []


def build_scheduler(options: "RayTuneSweeperConf") -> TrialScheduler:
    """Ray's scheduler with the options of its config; Ray sets metric and mode."""
    conf = options.scheduler
    given = {name: value for name, value in vars(conf).items() if name != "name"}
    if options.metric is None or conf.name == "fifo":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return ASHAScheduler(**given)
