"""End a sweep in order on SIGINT, as Ctrl-C sends it, and SIGTERM."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OF_RAY_TUNE = signal.SIGUSR1  # its handler ends a search after the current step
# From the first signal on. SLURM, which may have ended Ray's processes too, kills after 30 s.
_PATIENCE_SECONDS = 20.0


class Interrupts:
    """Context in which signals end a sweep, with the handlers of before put back at the end.

    ```text
    connecting to Ray       any signal: KeyboardInterrupt, which the context swallows
    searching               the first: results are saved, Ray Tune ends the search;
                            the second: KeyboardInterrupt
    Ray is being shut down  the third: KeyboardInterrupt
    ```

    Where Ray itself has been killed by the same signal, calls to it do not return. So the process
    ends after a while, whatever it waits for.

    Outside of the main thread, where Python lets nobody set signal handlers, it does nothing.

    Attributes:
        signum: The first signal; `None` if there was none.
        is_told: Whether the user has been told how to resume.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.is_told = False
        self._count = 0
        self._at_once = 1  # the signal that does not wait
        self._stop: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}
        self._save: Callable[[], None] = lambda: None
        self._give_up: Callable[[], None] = lambda: None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            signals = (*_SIGNALS, _OF_RAY_TUNE)
            self._previous = {signum: signal.getsignal(signum) for signum in signals}
            self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._timer is not None:
            self._timer.cancel()
        for signum, handler in self._previous.items():
            if handler is not None:  # else one of C's
                signal.signal(signum, handler)
        if self._previous and isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            self.signum = signal.SIGTERM  # by the handler that Ray sets while it connects
            return True
        return isinstance(error, KeyboardInterrupt) and self.signum is not None

    def listen(self) -> None:
        """Handle signals again, after Ray has set a handler of its own."""
        if self._previous:
            for signum in _SIGNALS:
                signal.signal(signum, self._on_signal)

    def save_by(self, save: Callable[[], None], give_up: Callable[[], None]) -> None:
        """Say how results are saved.

        Args:
            save: Called by the first signal, before the search ends.
            give_up: Called before the process ends by itself, since Ray does not answer.
        """
        self._save, self._give_up = save, give_up

    def end_search(self, before: Callable[[], None]) -> None:
        """Have the first signal end the search, which has begun, in order.

        Args:
            before: Called first.
        """
        handler = signal.getsignal(_OF_RAY_TUNE)
        if not self._previous or not callable(handler):
            return

        def stop() -> None:
            before()
            handler(_OF_RAY_TUNE, None)

        self._stop, self._at_once = stop, 2

    def hold(self) -> None:
        """Go on despite signals: what is left takes seconds."""
        self._stop, self._at_once = None, 3

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        self._count += 1
        if self.signum is None:
            self.signum = signum
            if self._stop is not None:
                self._timer = threading.Timer(_PATIENCE_SECONDS, self._exit)
                self._timer.daemon = True
                self._timer.start()
                self._save()
                self._stop()
        if self._count >= self._at_once:
            raise KeyboardInterrupt  # Ray's native code lets no other exception pass

    def _exit(self) -> None:
        assert self.signum is not None, "a timer without a signal"
        try:
            self._give_up()
        finally:
            os._exit(128 + self.signum)
