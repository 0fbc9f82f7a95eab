"""Experiment trackers that keep one run for a process: Weights & Biases and MLflow.

Imports neither: a tracker that the trial has not imported has no run.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lightning_mgpu.errors import one_line

log = logging.getLogger(__name__)

GROUP = "WANDB_RUN_GROUP"
_MOST_CHARACTERS = 128  # of the name of a group


@contextlib.contextmanager
def runs_ended() -> Iterator[None]:
    """End the runs that the block has started and not ended, as failed ones if it raises."""
    failed = True
    try:
        yield
        failed = False
    except SystemExit as end:
        failed = bool(end.code)
        raise
    finally:
        _end("wandb", lambda: _end_wandb(failed))
        _end("mlflow", lambda: _end_mlflow(failed))


def run_group(sweep_dir: Path, environment: Mapping[str, str], directory: str) -> dict[str, str]:
    """The variable by which W&B groups the runs of a sweep; empty if it is set.

    Args:
        sweep_dir: Directory of the sweep, which names the group.
        environment: Variables of the program that started it.
        directory: Its working directory.
    """
    if environment.get(GROUP):
        return {}
    inside = sweep_dir.is_relative_to(directory)
    parts = sweep_dir.relative_to(directory).parts if inside else sweep_dir.parts[-1:]
    return {GROUP: "-".join(parts)[-_MOST_CHARACTERS:]}


def _end_wandb(failed: bool) -> None:
    wandb = sys.modules["wandb"]
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))


def _end_mlflow(failed: bool) -> None:
    mlflow = sys.modules["mlflow"]
    while mlflow.active_run() is not None:  # runs may be nested
        mlflow.end_run("FAILED" if failed else "FINISHED")


def _end(name: str, end: Callable[[], None]) -> None:
    if name not in sys.modules:
        return
    try:
        end()
    except Exception as error:  # what the trial has found counts all the same
        log.warning("The run of %s could not be ended: %s.", name, one_line(error))
