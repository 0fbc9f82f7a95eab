"""Callbacks that Lightning asks for whenever a Trainer is made, in any program on the machine."""

from collections.abc import Callable
from typing import Any

factory: Callable[[], list[Any]] | None = None
"""Set in the process of a trial, for as long as the trial lasts."""


def callbacks() -> list[Any]:
    """The callback that reports to the sweep, inside a trial; nothing anywhere else."""
    return factory() if factory is not None else []
