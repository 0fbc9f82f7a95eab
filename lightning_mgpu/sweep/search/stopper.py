"""Stop a sweep before all its trials are done."""

import time
from collections.abc import Callable
from typing import Any

from ray.tune.stopper import Stopper
from typing_extensions import override

from lightning_mgpu.sweep.store.records import Records


class SweepStopper(Stopper):
    """Stop a sweep when its metric is missing, too many trials have failed, or its time is over.

    Ray keeps the stopper in the state of a sweep, and one that is resumed would go on with that of
    before, whose time may be over and whose records are a copy. So it is never itself pickled: what
    comes out is the latest one of the process.

    Args:
        records: The trials so far.
        rate: Which share of the ended trials may fail.
        seconds: How long this run of the sweep may take, from its first step; `None`: any time.

    Attributes:
        why: Why the sweep ended early, if it did.
        option: The option that says so.
    """

    def __init__(self, records: Records, rate: float, seconds: float | None) -> None:
        global _latest
        self._records, self._rate, self._seconds = records, rate, seconds
        self._started: float | None = None
        self.why: str | None = None
        self.option: str | None = None
        _latest = self

    @override
    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    @override
    def stop_all(self) -> bool:
        now = time.monotonic()
        if self._started is None:
            self._started = now
        if self._records.fatal is not None:
            self.why = "no trial could have a result"
        elif self._records.too_many_failed(self._rate):
            self.option = "max_failure_rate"
            self.why = f"more than hydra.sweeper.max_failure_rate={self._rate} have failed"
        elif self._seconds is not None and now - self._started >= self._seconds:
            self.option = "time_budget_s"
            self.why = f"hydra.sweeper.time_budget_s={self._seconds} is over"
        return self.why is not None

    @override
    def __reduce__(self) -> tuple[Callable[[], Stopper | None], tuple[()]]:
        return _get_latest, ()


_latest: SweepStopper | None = None


def _get_latest() -> Stopper | None:
    return _latest
