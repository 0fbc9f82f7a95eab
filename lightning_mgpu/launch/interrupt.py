"""Make the thread that runs rank 0 stop, whatever it is doing."""

import signal
import socket
import threading
from types import FrameType
from typing import Any

from lightning_mgpu._compat.python import raise_in_thread


class Interrupted(BaseException):
    """Raised in rank 0's function to stop it; no `Exception`, so that few handlers catch it."""


class Interrupter:
    """Interrupt the thread that entered the block, until the block ends.

    In the main thread it uses a signal that nobody else handles, which also ends a `sleep` or a
    blocking read. In another thread it can only wait for that thread's next bytecode.

    While active, `wakeup` becomes readable as soon as the process gets a signal, even if the main
    thread is stuck in native code and cannot run Python's handlers; one byte per signal: its
    number.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._signal = _free_signal() if self._is_main else None
        self.wakeup, self._wakeup_writer = socket.socketpair()
        self.wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._wanted = False
        self._responsive = threading.Event()

    def __enter__(self) -> "Interrupter":
        global _active
        if self._is_main:
            self._old_wakeup = signal.set_wakeup_fd(
                self._wakeup_writer.fileno(), warn_on_full_buffer=False
            )
        if self._signal is not None:
            _active = self
            signal.signal(self._signal, _dispatch)
        return self

    def __exit__(self, *_: Any) -> None:
        global _active
        self._wanted = False
        if self._signal is not None:
            _active = None
            signal.signal(self._signal, signal.SIG_DFL)
        if self._is_main:
            signal.set_wakeup_fd(self._old_wakeup)
        self.wakeup.close()
        self._wakeup_writer.close()

    def interrupt(self) -> None:
        """Raise `Interrupted` in the thread. Called from another thread."""
        self._wanted = True
        if self._signal is not None:
            signal.pthread_kill(self._thread, self._signal)
        else:
            raise_in_thread(self._thread, Interrupted)

    def ping(self) -> None:
        """Ask the main thread for a sign of life; `is_responsive` tells whether it came."""
        self._responsive.clear()
        if self._signal is not None:
            signal.pthread_kill(self._thread, self._signal)
        else:
            self._responsive.set()

    @property
    def is_responsive(self) -> bool:
        """Return whether the main thread has run Python, signal handlers included, since `ping`.

        If not, it is in native code, and a Ctrl-C that came before the `ping` waits there too.
        """
        return self._responsive.is_set()

    def answer(self) -> None:
        """Handle our signal in the main thread."""
        self._responsive.set()
        if self._wanted:
            raise Interrupted


_active: Interrupter | None = None  # the launch that runs; there is one at a time


def _dispatch(_signum: int, _frame: FrameType | None) -> None:
    if _active is not None:
        _active.answer()


def _free_signal() -> int | None:
    """A signal without a handler; real-time signals first, since programs hardly use them.

    One that has ours is free as well: somebody who saves all handlers and puts them back later, as
    Lightning does, may have put it there when its launch was over.
    """
    last = getattr(signal, "SIGRTMAX", None)
    candidates = [] if last is None else [last - offset for offset in range(2, 8)]
    for candidate in [*candidates, signal.SIGUSR2, signal.SIGUSR1]:
        if signal.getsignal(candidate) in (signal.SIG_DFL, _dispatch):
            return int(candidate)
    return None
