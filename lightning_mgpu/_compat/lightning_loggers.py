"""What we need of the writer of Lightning's `CSVLogger`, which starts its file anew."""

import csv
from typing import Any

from lightning_mgpu._compat.lightning import CSVLogger, _ExperimentWriter
from lightning_mgpu._compat.lightning_attributes import replaced


def has_written(logger: Any) -> bool:
    """Whether it is a `CSVLogger` that has begun to write."""
    return isinstance(logger, CSVLogger) and logger._experiment is not None


def adopt_file(logger: Any) -> None:
    """Have a `CSVLogger` add to the file that is there; for the process that writes, on rank 0."""
    if not isinstance(logger, CSVLogger):
        return
    if logger._experiment is None:
        # It would warn of the file, and delete it.
        with replaced(_ExperimentWriter, _check_log_dir_exists=lambda _: None):
            _ = logger.experiment
    writer = logger._experiment
    assert writer is not None
    writer._fs.makedirs(writer.log_dir, exist_ok=True)  # this may be another machine
    writer.metrics_keys = []
    if writer._fs.isfile(writer.metrics_file_path):
        with writer._fs.open(writer.metrics_file_path, "r", newline="") as file:
            writer.metrics_keys = next(csv.reader(file), [])


def restore_attribute(logger: Any, name: str, value: Any) -> None:
    """Give a logger an attribute of the same logger on another machine."""
    mine = vars(logger).get(name)
    if name != "_experiment" or mine is None:
        vars(logger)[name] = value
    elif isinstance(value, _ExperimentWriter) and isinstance(mine, _ExperimentWriter):
        vars(mine).update(vars(value))  # somebody may hold it
