"""Keeps a second process from going on with a sweep that still runs."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lightning_mgpu.errors import ConfigError

log = logging.getLogger(__name__)

# A sweep whose laptop is gone ends half a minute later.
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file of the sweep's directory for the length of the block.

    It ends with the process, however that ends. A process that holds it already is waited for, a
    minute at most.

    Raises:
        ConfigError: The sweep still runs.
    """
    with path.open("r+") as file:
        _lock(file, path.parent)
        yield


def _lock(file: TextIO, directory: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    has_waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{directory}: another process still runs this sweep. Interrupt that one, or"
                    " wait for its end."
                ) from None
            if not has_waited:
                log.info("Waiting: another process still runs the sweep in %s.", directory)
            has_waited = True
            time.sleep(_POLL_SECONDS)
        except OSError:  # nor on this file system
            return
        else:
            return
