"""Make the thread that runs rank 0 stop, whatever it is doing."""

import ctypes
import signal
import socket
import threading
from types import FrameType
from typing import Any

__all__: list[str] = []


class Interrupted(BaseException):
    """Raised inside rank 0's function to make it end; not an `Exception`, so few catch it."""


class Interrupter:
    """A way into the thread that entered the block, for as long as the block lasts.

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
        self._active = threading.Lock()
        self._done = False

    def __enter__(self) -> "Interrupter":
        if self._is_main:
            self._old_wakeup = signal.set_wakeup_fd(
                self._wakeup_writer.fileno(), warn_on_full_buffer=False
            )
            if self._signal is not None:
                self._old_handler = signal.signal(self._signal, _raise_interrupted)
        return self

    def __exit__(self, *_: Any) -> None:
        with self._active:
            self._done = True
        if self._is_main:
            if self._signal is not None:
                signal.signal(self._signal, self._old_handler)
            signal.set_wakeup_fd(self._old_wakeup)
        self.wakeup.close()
        self._wakeup_writer.close()

    def interrupt(self) -> None:
        """Raise `Interrupted` in the thread. Called from another thread."""
        with self._active:
            if self._done:
                return
            if self._signal is not None:
                signal.pthread_kill(self._thread, self._signal)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(Interrupted)
                )


def raises_keyboard_interrupt(signum: int) -> bool:
    """Whether the pending signal `signum` is a Ctrl-C that nobody but Python handles."""
    return signum == signal.SIGINT and signal.getsignal(signum) is signal.default_int_handler


def _raise_interrupted(_signum: int, _frame: FrameType | None) -> None:
    raise Interrupted


def _free_signal() -> signal.Signals | int | None:
    """A signal without a handler; real-time signals first, since programs hardly use them."""
    last = getattr(signal, "SIGRTMAX", None)
    candidates = [] if last is None else [last - offset for offset in range(2, 8)]
    for candidate in [*candidates, signal.SIGUSR2, signal.SIGUSR1]:
        if signal.getsignal(candidate) is signal.SIG_DFL:
            return candidate
    return None
