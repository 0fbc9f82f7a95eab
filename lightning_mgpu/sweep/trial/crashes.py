"""Record crashes of native code in a trial's log, and read them there."""

import contextlib
import faulthandler
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_TAIL_BYTES = 2**18
# The last words of a process: of a trial that was tried again, other lines follow.
_CRASH = re.compile(
    r"^Fatal Python error: (?P<what>.+)\n"
    r"(?:(?:Current t|T)hread.*\n|Stack \(most.*\n|Extension modules.*\n|[ <].*\n|\n)*\Z",
    re.MULTILINE,
)


@contextlib.contextmanager
def crashes_to(file: TextIO) -> Iterator[None]:
    """Write the Python stacks to a file where a signal such as SIGSEGV ends the process."""
    was_enabled = faulthandler.is_enabled()  # as Ray does, for its own log
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.disable()
        if was_enabled and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)


def crash_in(log: Path) -> str | None:
    """The crash with which a log ends, such as ``Segmentation fault``; `None` if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    found = _CRASH.search(f"{text}\n")
    return None if found is None else found["what"]
