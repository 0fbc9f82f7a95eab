"""Keep a second process from resuming a sweep that still runs."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_mgpu.errors import ConfigError

log = logging.getLogger(__name__)

_NAME = ".lock"
# A sweep whose laptop is gone ends half a minute later.
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a sweep's directory for the length of the block.

    The lock is released when the process ends, however it ends. A process that holds it already is
    waited for, a minute at most. Where the file system has no locks, nothing is locked.

    Raises:
        ConfigError: The sweep still runs.
    """
    lock = FileLock(directory / _NAME, poll_interval=_POLL_SECONDS)
    with contextlib.suppress(NotImplementedError, OSError):  # the file system has no locks
        _acquire(lock, directory)
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def _acquire(lock: FileLock, directory: Path) -> None:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)
        return
    log.info("Waiting: another process still runs the sweep in %s.", directory)
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout as error:
        raise ConfigError(
            f"{directory}: another process still runs this sweep. Interrupt that one, or wait for"
            " its end."
        ) from error
