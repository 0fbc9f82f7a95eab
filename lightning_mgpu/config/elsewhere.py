"""Recognise strategies that train in other processes than the Trainer's."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RunsElsewhere(Protocol):
    """A strategy, or the class of one.

    Attributes:
        runs_elsewhere: Whether nothing is trained in the process that calls the Trainer.
    """

    runs_elsewhere: bool


def runs_elsewhere(strategy: Any) -> bool:
    """Return whether a strategy, or strategy class, trains in other processes only."""
    return isinstance(strategy, RunsElsewhere) and strategy.runs_elsewhere
