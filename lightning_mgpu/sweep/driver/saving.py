"""Write the results of a sweep before Ray is shut down, however the sweep ends."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hydra.errors import HydraException

from lightning_mgpu.errors import ConfigError, SweepFailedError, one_line
from lightning_mgpu.ray.connection import remove_files
from lightning_mgpu.sweep.driver.interrupts import Interrupts
from lightning_mgpu.sweep.store.results import RESULTS, relative, resume_command, write_results
from lightning_mgpu.sweep.store.table import write_table

if TYPE_CHECKING:
    from lightning_mgpu.sweep.settings.prepared import PreparedSweep

log = logging.getLogger(__name__)


@contextmanager
def results_saved(sweep: "PreparedSweep", interrupts: Interrupts) -> Iterator[None]:
    """Write the results at the end of the block, also when it raises or is interrupted.

    Raises:
        ConfigError, HydraException: It was raised before the first trial.
        SweepFailedError: The search has failed; says where the results are and how to resume.
    """

    def give_up() -> None:
        tell_if_interrupted(sweep, interrupts)
        remove_files()

    interrupts.save_by(lambda: _save(sweep), give_up)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not sweep.records.trials and isinstance(error, (ConfigError, HydraException)):
            raise
        interrupts.hold()
        _save(sweep)
        if interrupts.signum is None:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise SweepFailedError(
                f"The search ended with an error, {type(error).__name__}: {one_line(error, 500)}\n"
                f"{_left(sweep)}\nHYDRA_FULL_ERROR=1 shows where it was raised."
            ) from error
    else:
        interrupts.hold()
        _save(sweep)
    tell_if_interrupted(sweep, interrupts)


def tell_if_interrupted(sweep: "PreparedSweep", interrupts: Interrupts) -> None:
    """Log, once, where the results of an interrupted sweep are and how to resume it."""
    if interrupts.signum is None or interrupts.is_told:
        return
    interrupts.is_told = True
    log.warning("Interrupted (%s). %s", signal.Signals(interrupts.signum).name, _left(sweep))


def _left(sweep: "PreparedSweep") -> str:
    path = sweep.directory / RESULTS
    results = f"Results so far: {relative(path)}" if path.exists() else "There are no results yet."
    return f"{results}\nResume with: {resume_command(sweep.directory)}"


def _save(sweep: "PreparedSweep") -> None:
    # A sweep that failed to resume knows none of its trials, and an earlier run has written them.
    if sweep.records.trials or not (sweep.directory / RESULTS).exists():
        write_results(sweep.records, sweep.directory)
        write_table(sweep.records, sweep.directory)
