"""Tell strategies that train in other processes than the one that calls the Trainer."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RunsElsewhere(Protocol):
    """A strategy, or the class of one.

    Attributes:
        runs_elsewhere: Whether nothing is trained in the process that calls the Trainer.
    """

    runs_elsewhere: bool


def runs_elsewhere(strategy: Any) -> bool:
    """Whether a strategy, or a class of strategies, trains in processes of its own alone."""
    return isinstance(strategy, RunsElsewhere) and strategy.runs_elsewhere
