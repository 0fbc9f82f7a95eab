"""Python stacks of a process that a fatal signal ends, such as SIGABRT by Gloo or SIGSEGV."""

import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CRASHES = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV})


class LastWords:
    """A file into which a worker writes its stacks when it crashes, and that its caller reads."""

    def __init__(self) -> None:
        # For the worker, which calls `faulthandler.enable` with it.
        self.file, path = tempfile.mkstemp(prefix="lightning_mgpu_")
        os.unlink(path)

    def read(self, exit_code: int | None) -> str:
        """What the worker has written; empty if it has not crashed.

        Args:
            exit_code: How it ended. A process that it had forked may have written, too.
        """
        if exit_code is None or -exit_code not in _CRASHES:
            return ""
        text = os.pread(self.file, os.fstat(self.file).st_size, 0).decode(errors="replace")
        return text.partition("\nExtension modules:")[0].strip()

    def close(self) -> None:
        """Close this end. May be called twice."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


@contextmanager
def stacks_on_crash() -> Iterator[None]:
    """Context in which a crash of this process shows its Python stacks on standard error."""
    if faulthandler.is_enabled() or sys.__stderr__ is None:
        yield
        return
    with suppress(OSError, RuntimeError, ValueError):  # it may be closed
        faulthandler.enable(sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.disable()
