"""Transfer loggers between the driver and rank 0 of the workers, which writes them."""

import csv
import logging
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

from lightning.fabric.loggers.csv_logs import CSVLogger, _ExperimentWriter
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

log = logging.getLogger(__name__)


def send(loggers: Iterable[Logger]) -> None:
    """Resolve on the driver, before pickling, what loggers would look up on the workers."""
    for logger in loggers:
        _ = logger.version  # on first use, and by then the workers' directory is there
        if isinstance(logger, CSVLogger) and logger._experiment is not None:
            logger.save()  # or both sides would write the same rows


def go_on(loggers: Iterable[Logger], began: bool) -> None:
    """Make loggers append to files of earlier calls, which a new CSV writer would delete.

    Args:
        loggers: Those of the Trainer.
        began: Whether these loggers have written before, also if they do not know of it.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger) and (began or logger._experiment is not None):
            _adopt_file(logger)


def states(loggers: Iterable[Logger], dump: Callable[[Any], bytes]) -> list[dict[str, bytes]]:
    """Pickled attributes of each logger, as rank 0 has them after a run."""
    found = []
    for logger in loggers:
        state: dict[str, bytes] = {}
        # As for a pickle: loggers leave connections out, and put in by what to take them up again.
        attributes = logger.__reduce_ex__(2)[2]
        for name, value in attributes.items() if isinstance(attributes, dict) else ():
            try:
                state[name] = dump(value)
            except Exception as error:
                log.debug("%s.%s stays on rank 0 (%s).", type(logger).__name__, name, error)
        found.append(state)
    return found


def restore(logger: Logger, state: dict[str, bytes], load: Callable[[bytes], Any]) -> None:
    """Give the driver's logger the attributes of rank 0's."""
    for name, data in state.items():
        value, mine = load(data), vars(logger).get(name)
        if name != "_experiment" or mine is None:
            vars(logger)[name] = value
        elif isinstance(value, _ExperimentWriter) and isinstance(mine, _ExperimentWriter):
            vars(mine).update(vars(value))  # somebody may hold it


def _adopt_file(logger: CSVLogger) -> None:
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    if logger._experiment is None:
        with patch.object(_ExperimentWriter, "_check_log_dir_exists", lambda _: None):
            _ = logger.experiment
    writer = logger._experiment
    assert writer is not None
    writer._fs.makedirs(writer.log_dir, exist_ok=True)  # this may be another machine
    writer.metrics_keys = []
    if writer._fs.isfile(writer.metrics_file_path):
        with writer._fs.open(writer.metrics_file_path, "r", newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])
