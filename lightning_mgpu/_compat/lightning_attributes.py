"""Assigning private attributes of Lightning's objects, which must be there to begin with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


def assign(obj: Any, name: str, value: Any) -> None:
    """Set an attribute that Lightning reads.

    Raises:
        AttributeError: There is none of that name: a plain assignment would make a new one, which
            nobody reads.
    """
    getattr(obj, name)
    setattr(obj, name, value)


@contextmanager
def replaced(obj: Any, **values: Any) -> Iterator[None]:
    """Set attributes that are there for the length of the block."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(obj, name, value))  # which looks for it
        yield
