"""Handle of one worker process."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_mgpu.launch import protocol
from lightning_mgpu.launch.channel import Channel
from lightning_mgpu.launch.last_words import LastWords

_BOOT = "from lightning_mgpu.launch.worker import main; main({fd}, {parent}, {main}, {crash})"
_PRELOAD = "from lightning_mgpu._compat.namespace import preload; preload({namespace!r}); "
_EXIT_SECONDS = 5.0


class WorkerHandle:
    """A worker process; starts it without waiting until it is up.

    It runs in a session of its own: the terminal's Ctrl-C reaches the caller alone, which then
    decides, and `kill` takes the worker's children with it.

    Args:
        environment: The worker's environment until its first launch.
        path: The worker's `sys.path` until its first launch; must find this package.
        namespace: Which of Lightning's packages to import at once; `None` for neither.
    """

    def __init__(
        self, environment: dict[str, str], path: Sequence[str], namespace: str | None = None
    ) -> None:
        self.channel, theirs = Channel.pair()
        self._last_words = LastWords()
        boot = _BOOT.format(
            fd=theirs.fileno(),
            parent=os.getpid(),
            main=threading.current_thread() is threading.main_thread(),
            crash=self._last_words.file,
        )
        # `-P`-like safety without needing Python 3.11: the path is set before the first import.
        # Collecting garbage while importing costs a third of the start and finds none.
        entries = [entry for entry in path if isinstance(entry, str)]  # Python skips others too
        # Slow to import, and if the caller has use for it, so has a worker.
        preload = "" if namespace is None else _PRELOAD.format(namespace=namespace)
        boot = f"import gc, sys; gc.disable(); sys.path[:] = {entries!r}; {preload}{boot}"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", boot],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._last_words.file],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def is_stopped(self) -> bool:
        """Return whether the process is stopped by a signal; `False` where it cannot be told."""
        with suppress(OSError, ValueError):
            status = Path(f"/proc/{self.pid}/stat").read_text()
            return status.rpartition(")")[2].split()[0] == "T"
        return False

    def send(self, message: Any, file: int | None = None) -> None:
        """Send a message. If the worker is gone, waiting for its answer fails."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.channel.send(message, file)

    def deliver(self, message: Any) -> None:
        """Send from a background thread; kill the worker on errors, which nobody would see."""
        try:
            self.send(message)
        except BaseException:
            self.kill()
            raise

    def comes_to_rest(self, deadline: float) -> bool:
        """Wait until the worker is idle or dead; `False` if not by `deadline` (monotonic)."""
        try:
            while select.select([self.channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if isinstance(self.channel.receive()[0], protocol.Idle):
                    return True
        except EOFError:
            return self.exit_code() is not None
        return False

    def exit_code(self) -> int | None:
        """The exit code of a worker that closed its connection."""
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """The Python stacks of a worker that has crashed; empty where there are none."""
        return self._last_words.read(self._process.returncode)

    def kill(self) -> None:
        """Kill the process and all it started. May be called twice."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill the process and close the socket."""
        self.kill()
        self.channel.close()
        self._last_words.close()


class Deliveries:
    """Send messages in one thread each; the block ends when all have arrived.

    Plain threads, since an executor starts none once the main thread has come to its end.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, worker: WorkerHandle, message: Any) -> None:
        """Start to send `message` to `worker`, however long that takes to read it."""
        thread = threading.Thread(
            target=worker.deliver, args=(message,), name="mgpu-send", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def __enter__(self) -> "Deliveries":
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
