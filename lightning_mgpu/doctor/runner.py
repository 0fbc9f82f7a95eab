"""Run checks side by side, each within its time."""

import threading
import time
from collections.abc import Iterable, Iterator

from lightning_mgpu.doctor.apart import failed, late, run_apart
from lightning_mgpu.doctor.finding import Check, Finding

_GRACE = 2.0  # seconds to kill a process and to read what it has left


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run checks, and give what they find in their order, as soon as it is there.

    A check that raises, or is not done in time, is a finding.
    """
    running = [_Running(check) for check in checks]
    for one in running:
        yield from one.findings()


class _Running:
    """A check in a thread, which nobody waits for once its time is up."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._found: list[Finding] = []
        self._end = time.monotonic() + check.seconds + (_GRACE if check.apart else 0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        check = self._check
        try:
            for finding in run_apart(check) if check.apart else check.run(*check.arguments):
                self._found.append(finding)
        except Exception as error:
            self._found.append(failed(check.name, error))

    def findings(self) -> list[Finding]:
        self._thread.join(max(self._end - time.monotonic(), 0))
        found = list(self._found)
        return [*found, late(self._check)] if self._thread.is_alive() else found
