"""Refuse a sweep in the process of a trial, or in one that such a process has started."""

import os
from pathlib import Path

from lightning_mgpu.errors import ConfigError

VARIABLE = "LIGHTNING_MGPU_TRIAL"
"""Environment variable that says which trial runs; child processes inherit it."""


def marked(number: int, sweep_dir: Path) -> dict[str, str]:
    """The variable for the process of a trial.

    Args:
        number: The trial's.
        sweep_dir: Directory of its sweep.
    """
    return {VARIABLE: f"trial {number} of {sweep_dir}"}


def refuse_nested() -> None:
    """Refuse to start a sweep where a trial runs.

    Raises:
        ConfigError: This process is a trial's, or was started by one.
    """
    trial = os.environ.get(VARIABLE)
    if trial is None:
        return
    raise ConfigError(
        f"hydra/sweeper=ray_tune: refused, since this process was started by {trial}, and each"
        " trial of a sweep within it would start another one. If the strategy runs the script"
        " again for each device, use trainer.strategy=mgpu_ddp. If the script calls its main"
        ' function when it is imported, put the call below `if __name__ == "__main__":`. If'
        f" another sweep is meant, start it without {VARIABLE} in its environment."
    )
