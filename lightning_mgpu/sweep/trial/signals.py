"""Signal handlers that an application sets in a trial, which runs on a thread."""

import functools
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

# Those of timers: without a handler they would end the process.
_TIMERS = frozenset({signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF})

_told: set[int] = set()


def ignore_handlers() -> None:
    """Ignore handlers set on a thread of this process from now on, instead of refusing them.

    Python has handlers set by the main thread only, which here is Ray's: a trial is stopped by its
    sweep, and the process is Ray's to end.
    """
    vars(signal)["signal"] = _lenient(signal.signal)


def forget_handlers() -> None:
    """Log ignored handlers again: another trial begins."""
    _told.clear()


def _lenient(set_handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(set_handler)
    def lenient(signalnum: int, handler: Any) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main or signalnum in _TIMERS or signalnum not in signal.valid_signals():
            return set_handler(signalnum, handler)
        if signalnum not in _told:
            _told.add(signalnum)
            log.warning(
                "The handler for %s is ignored: a trial runs on a thread of a process of Ray's,"
                " which only the sweep stops.",
                signal.Signals(signalnum).name,
            )
        return signal.getsignal(signalnum)

    return lenient
