"""Say where in the work a thread is, and add that to exceptions."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_mgpu.engine.worker_thread import Cancelled

_PREFIX = "(raised in "

Place = str | Callable[[], str]
"""Where a thread is: the words, or what tells them."""

_local = threading.local()


class Where(Exception):
    """The cause given to an exception on Python 3.10, which knows no notes."""


def places() -> list[Place]:
    """What the calling thread has entered by `noted`, the innermost last; changes as it goes on."""
    if not hasattr(_local, "places"):
        _local.places = []
    found: list[Place] = _local.places
    return found


@contextmanager
def noted(where: Place) -> Iterator[None]:
    """Add a note to exceptions that leave the block.

    Args:
        where: What the note says; or what tells it, once there is an exception.
    """
    entered = places()
    entered.append(where)
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
    finally:
        entered.pop()


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, once."""
    if hasattr(error, "add_note"):
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    elif error.__cause__ is None:
        error.__cause__ = Where(note)
