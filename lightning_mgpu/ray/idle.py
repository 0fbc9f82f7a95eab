"""Stop idle workers after a time, or when others wait for their resources."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

log = logging.getLogger(__name__)

# How often to see whether Ray has been shut down meanwhile, which nobody tells us.
_LOOK_SECONDS = 5.0


class IdleTimer:
    """Wait in a thread until idle workers are to stop, then stop them.

    One of the workers looks at what the cluster's other users wait for, so that this process makes
    no call to Ray by itself, which could come in the middle of `ray.shutdown`.

    Args:
        worker: The actor that looks.
        calls: How many runs it has served.
        held: Names of the resources that the workers hold.
        seconds: How long the workers may be idle.
        end: Ends them, unless a call has come in the meantime.
    """

    def __init__(
        self, worker: Any, calls: int, held: Sequence[str], seconds: float, end: Callable[[], None]
    ) -> None:
        self._awake = threading.Event()
        self._stopped = False
        self._end = end
        self._deadline = time.monotonic() + seconds
        self._wanted = None
        if seconds > 0:
            self._wanted = worker.watch_demand.remote(calls, list(held), seconds).future()
            self._wanted.add_done_callback(lambda _: self._awake.set())
        threading.Thread(target=self._wait, name="mgpu-ray-idle", daemon=True).start()

    def stop(self) -> None:
        """Stop waiting: the next call has come, or the workers have been stopped."""
        self._stopped = True
        self._awake.set()

    def _wait(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0 and ray.is_initialized():
            awake = self._awake.wait(min(left, _LOOK_SECONDS))
            if self._stopped:
                return
            if awake and self._is_asked():
                break
        self._end()

    def _is_asked(self) -> bool:
        """Return whether a worker has seen that others wait, or has died."""
        assert self._wanted is not None
        if self._wanted.exception() is not None or self._wanted.result():
            return True
        log.warning(
            "This version of Ray does not report pending requests, so idle workers keep their"
            " resources until `lightning_mgpu.ray.close()` or the end of `keep_warm`'s time."
        )
        self._awake.clear()
        return False
