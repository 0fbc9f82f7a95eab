"""Write the results of a sweep before Ray is shut down, however the sweep ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_mgpu.errors import ConfigError, SweepFailedError, one_line
from lightning_mgpu.sweep.store.results import RESULTS, relative, resume_command, write_results

if TYPE_CHECKING:
    from lightning_mgpu.sweep.settings.prepared import PreparedSweep


@contextmanager
def results_saved(sweep: "PreparedSweep") -> Iterator[None]:
    """Write the results at the end of the block, also when it raises.

    Raises:
        ConfigError: It was raised before the first trial.
        SweepFailedError: The search has failed; says where the results are and how to resume.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) and not sweep.records.trials:
            raise
        _save(sweep)
        raise SweepFailedError(
            f"The search ended with an error, {type(error).__name__}: {one_line(error, 500)}\n"
            f"{told(sweep)}\nHYDRA_FULL_ERROR=1 shows where it was raised."
        ) from error
    _save(sweep)


def told(sweep: "PreparedSweep") -> str:
    """Where the results of a sweep are that has not ended, and how to resume it."""
    return (
        f"Results so far: {relative(sweep.directory / RESULTS)}\n"
        f"Resume with: {resume_command(sweep.directory)}"
    )


def _save(sweep: "PreparedSweep") -> None:
    # A sweep that failed to resume knows none of its trials, and an earlier run has written them.
    if sweep.records.trials or not (sweep.directory / RESULTS).exists():
        write_results(sweep.records, sweep.directory)
