"""Temporarily replace dict and list entries during a step."""

from collections.abc import Iterable
from typing import Any

MISSING: Any = object()
"""What is in a place that is empty."""


class EntrySwap:
    """Replacements for entries of dicts and lists, with the originals.

    Args:
        patches: For each place a holder (a dict or list), a key of it, what is there, and what
            stands in for that.
    """

    def __init__(self, patches: Iterable[tuple[Any, Any, Any, Any]]) -> None:
        self._patches = list(patches)

    def apply(self) -> None:
        """Set the replacements, except where the original is gone already."""
        for holder, key, old, new in self._patches:
            if _at(holder, key) is old:
                holder[key] = new

    def revert(self) -> None:
        """Restore the originals, except where the step has set something else."""
        for holder, key, old, new in self._patches:
            if _at(holder, key) is new:
                if old is MISSING:
                    del holder[key]
                else:
                    holder[key] = old

    def is_stale(self) -> bool:
        """Return whether an entry is no longer the original."""
        return any(_at(holder, key) is not old for holder, key, old, _ in self._patches)


def _at(holder: Any, key: Any) -> Any:
    try:
        return holder[key]
    except (KeyError, IndexError):
        return MISSING
