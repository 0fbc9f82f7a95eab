"""Add to an exception where in the work it occurred."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_mgpu.engine.worker_thread import Cancelled

_PREFIX = "(raised in "


class Where(Exception):
    """The cause given to an exception on Python 3.10, which knows no notes."""


@contextmanager
def noted(where: str | Callable[[], str]) -> Iterator[None]:
    """Add a note to exceptions that leave the block.

    Args:
        where: What the note says; or what tells it, once there is an exception.
    """
    try:
        yield
    except Cancelled:
        raise
    except BaseException as error:
        where = where() if callable(where) else where
        # (One error may leave several tasks, if it arose in what they called together.)
        if hasattr(error, "add_note"):
            if not any(note.startswith(_PREFIX) for note in getattr(error, "__notes__", ())):
                error.add_note(f"{_PREFIX}{where})")
        elif error.__cause__ is None:
            error.__cause__ = Where(f"raised in {where}")
        raise


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, once."""
    if hasattr(error, "add_note"):
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    elif error.__cause__ is None:
        error.__cause__ = Where(note)
