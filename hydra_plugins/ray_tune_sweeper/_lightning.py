"""Callbacks that Lightning asks for whenever a Trainer is made, in any program on the machine."""

from collections.abc import Callable
from typing import Any

factory: Callable[[str], list[Any]] | None = None
"""Set in the process of a trial, for as long as the trial lasts.

Makes the callbacks for a Trainer of the namespace of that name.
"""


def callbacks() -> list[Any]:
    """The callback that reports to the sweep, inside a trial; nothing anywhere else."""
    return factory("lightning") if factory is not None else []


def callbacks_of_pytorch_lightning() -> list[Any]:
    """The same for Trainers of `pytorch_lightning`."""
    return factory("pytorch_lightning") if factory is not None else []
