"""What a check is, and what it finds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Level(str, Enum):
    """How good or bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """Works, but slower or less than it could, or not always."""
    BAD = "bad"
    """Does not work: the command exits with 1."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty if all is well."""
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers for the file only, as JSON has them."""


@dataclass(frozen=True)
class Check:
    """A function that looks at one thing, and the time that it may take."""

    name: str
    run: Callable[..., Iterable[Finding]]
    arguments: tuple[Any, ...] = ()
    """For one that runs apart: as JSON has them."""
    seconds: float = 5.0
    apart: bool = False
    """In a process of its own, since it imports much or may hang; a function of a module then."""


def ok(name: str, found: str, **details: Any) -> Finding:
    """A finding that all is well."""
    return Finding(name, Level.OK, found, details=details)


def warn(name: str, found: str, advice: str, **details: Any) -> Finding:
    """A finding of something to improve."""
    return Finding(name, Level.WARN, found, advice, details)


def bad(name: str, found: str, advice: str, **details: Any) -> Finding:
    """A finding of something that does not work."""
    return Finding(name, Level.BAD, found, advice, details)
