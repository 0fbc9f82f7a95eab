"""Say on an exception where in the work it arose."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_mgpu.engine.slot import Cancelled

__all__: list[str] = []


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
        if hasattr(error, "add_note"):
            error.add_note(f"(raised in {where})")
        elif error.__cause__ is None:
            error.__cause__ = Where(f"raised in {where}")
        raise
