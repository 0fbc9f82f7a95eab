"""Other objects in the places of some, for as long as a step lasts."""

from collections.abc import Iterable
from typing import Any

MISSING: Any = object()
"""What is in a place that is empty."""


class Patches:
    """What is put into which places, and what belongs there.

    Args:
        patches: For each place a holder (a dict or list), a key of it, what is there, and what
            stands in for that.
    """

    def __init__(self, patches: Iterable[tuple[Any, Any, Any, Any]]) -> None:
        self._patches = list(patches)

    def apply(self) -> None:
        """Put the stand-ins in, where nobody has put something else meanwhile."""
        for holder, key, old, new in self._patches:
            if _at(holder, key) is old:
                holder[key] = new

    def revert(self) -> None:
        """Take them out, unless the step has put something in their place."""
        for holder, key, old, new in self._patches:
            if _at(holder, key) is new:
                if old is MISSING:
                    del holder[key]
                else:
                    holder[key] = old

    def is_stale(self) -> bool:
        """Whether a place no longer holds what it did."""
        return any(_at(holder, key) is not old for holder, key, old, _ in self._patches)


def _at(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError):
        return MISSING
