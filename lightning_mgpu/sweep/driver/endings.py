"""Name what has ended a trial."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_mgpu.sweep.search.stopper import SweepStopper

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import SchedulerConf


class Endings:
    """What ends the trials of a sweep before their time.

    Args:
        scheduler: The options of the scheduler.
        stopper: What ends the sweep.
    """

    def __init__(self, scheduler: "SchedulerConf", stopper: SweepStopper) -> None:
        self._name = scheduler.name
        self._longest = getattr(scheduler, "max_t", None)
        self._time = getattr(scheduler, "time_attr", "")
        self._stopper = stopper

    def stopped(self, result: Mapping[str, Any]) -> str:
        """What has stopped a trial after this report: the scheduler's choice, or its `max_t`."""
        if self._longest is not None and result.get(self._time, 0) >= self._longest:
            return f"{self._name}, max_t={self._longest}"
        return self._name

    def cut_short(self) -> str | None:
        """The option that has ended the sweep, and the trials under way with it."""
        return self._stopper.option
