"""Environment variables that are set for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored(*names: str) -> Iterator[None]:
    """Put environment variables back after the block, as they were before.

    Args:
        *names: Which; by default all.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in names or {*before, *os.environ}:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
