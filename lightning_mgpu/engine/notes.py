"""Say on an exception where in the work it arose."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_mgpu.engine.slot import Cancelled

__all__: list[str] = []

_PREFIX = "(raised in "


class Where(Exception):
    """The cause given to an exception on Python 3.10, which knows no notes."""


@contextmanager
def noted(where: str) -> Iterator[None]:
    """Add a note to exceptions that leave the block."""
    try:
        yield
    except Cancelled:
        raise
    except BaseException as error:
        # (One error may leave several tasks, if it arose in what they called together.)
        if hasattr(error, "add_note"):
            if not any(note.startswith(_PREFIX) for note in getattr(error, "__notes__", ())):
                error.add_note(f"{_PREFIX}{where})")
        elif error.__cause__ is None:
            error.__cause__ = Where(f"raised in {where}")
        raise


@contextmanager
def hinted() -> Iterator[None]:
    """Add a hint to errors that often come from values of one part of a batch."""
    try:
        yield
    except RuntimeError as error:
        hint = any(text in str(error) for text in _OF_A_PART)
        if hint and hasattr(error, "add_note") and _HINT not in getattr(error, "__notes__", ()):
            error.add_note(_HINT)
        raise


_OF_A_PART = ("The size of tensor a (", "backward through the graph a second time")
_HINT = (
    "(What attributes or hooks keep from a module's `forward` belongs to one micro-batch: to use it"
    " in the step, return it from the split module's `forward`. And what they hold before the call"
    " goes to every micro-batch whole: hand it on as an argument.)"
)
