"""Checks for processes of their own, which import this file; so it imports little."""

import fcntl
import os
import sys
import threading
from collections.abc import Iterator

from lightning_mgpu.doctor.finding import Finding, ok


def raises() -> Iterator[Finding]:
    yield ok("before", "found")
    raise RuntimeError("cannot look")


def hangs() -> Iterator[Finding]:
    threading.Event().wait()
    yield ok("after", "found")


def hangs_with(path: str) -> Iterator[Finding]:
    """Keep a lock for as long as the process lives, then hang."""
    with open(f"{path}.new", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(f"{path}.new", path)
        yield from hangs()


def dies() -> Iterator[Finding]:
    yield ok("before", "found")
    print("segmentation fault", file=sys.stderr, flush=True)
    os._exit(3)
