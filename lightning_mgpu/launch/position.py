"""Where a rank is, as seen from another thread of its process."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary, StackSummary
from typing import Any

from lightning_mgpu._compat.python import stack_of
from lightning_mgpu._compat.torch_collectives import (
    RecordedCollective,
    collective_counts,
    group_members,
    recorded_collectives,
)

# Torch counts the end of a collective a moment before it records it.
_SETTLED_SECONDS = 0.05
_LIBRARIES = (sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent))


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    All but `counts` and `is_pending` are empty if no details were asked for and nothing is pending.

    Attributes:
        stack: Its Python stack, as text.
        place: File, line and function of the program's innermost call, and of the innermost within.
        counts: Something else whenever the rank has started or ended a collective.
        is_pending: Whether a collective of its may not have ended.
        collectives: Those of this launch, oldest first, as far as they are recorded; `None` if they
            are not known.
        groups: The ranks of each process group.
        progress: What the launched function says of itself, by name.
    """

    stack: str
    place: str
    counts: tuple[Any, ...]
    is_pending: bool
    collectives: tuple[RecordedCollective, ...] | None
    groups: dict[str, tuple[int, ...]]
    progress: dict[str, Any]

    @property
    def pending(self) -> RecordedCollective | None:
        """The oldest collective that has not ended."""
        if not self.is_pending:  # what is not marked as ended was never watched
            return None
        return next((each for each in self.collectives or () if not each.done), None)


class Observer:
    """Look at the thread that runs a rank; called from another one.

    Args:
        thread: Its identity.
    """

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._progress: Callable[[], dict[str, Any]] = dict
        self.begin()

    def begin(self) -> None:
        """Forget earlier launches of this process."""
        self._earlier = set(collective_counts())
        self._seen: tuple[Any, ...] = ()
        self._seen_at = self._read_at = 0.0
        self._collectives: tuple[RecordedCollective, ...] = ()

    @contextmanager
    def observing(self, function: Any) -> Iterator[None]:
        """Context in which `function` runs; its method `progress`, if any, is called meanwhile."""
        self._progress = getattr(function, "progress", dict)
        try:
            yield
        finally:
            self._progress = dict

    def counts(self) -> tuple[Any, ...]:
        """Something else whenever the rank has started or ended a collective."""
        return tuple(
            (group, *counts)
            for group, counts in sorted(collective_counts().items())
            if group not in self._earlier
        )

    def look(self, detailed: bool) -> Position:
        """The rank's position.

        Args:
            detailed: Whether its collectives are wanted even if none is pending.
        """
        counts = self.counts()
        is_pending = any(started != ended for _, started, ended in counts)
        if not detailed and not is_pending:
            return Position("", "", counts, False, None, {}, {})
        self._read(counts)
        stack = stack_of(self._thread)
        return Position(
            "".join(stack.format()),
            _place(stack),
            counts,
            is_pending,
            self._collectives,
            group_members(),
            self._told(),
        )

    def _read(self, counts: tuple[Any, ...]) -> None:
        """Read the record, which is dear, if it may say something else than it did."""
        now = time.monotonic()
        if counts != self._seen:
            self._seen, self._seen_at = counts, now
        elif self._read_at > self._seen_at + _SETTLED_SECONDS:
            return
        self._collectives = tuple(recorded_collectives(self._earlier))
        self._read_at = now

    def _told(self) -> dict[str, Any]:
        try:
            return self._progress()
        except Exception:  # the rank goes on meanwhile, and changes what it is asked for
            return {}


def _place(stack: StackSummary) -> str:
    if not stack:
        return "an unknown place"
    last = stack[-1]
    own = [call for call in stack if not call.filename.startswith((*_LIBRARIES, "<"))]
    if not own or own[-1] is last:
        return _shown(last)
    return f"{_shown(own[-1])}, within it {_shown(last)}"


def _shown(call: FrameSummary) -> str:
    return f"{call.filename}:{call.lineno} in `{call.name}`"
