"""Run a sweep's command on the cluster's head for a laptop outside the cluster."""

import importlib.util
import os
import queue
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from lightning_mgpu.sweep.client.files import File, SweepFiles
from lightning_mgpu.sweep.job.submitted import SubmittedSweep

_WAIT_SECONDS = 0.5
_DRAIN_SECONDS = 5.0

# Of this process alone, as Ray has started it.
_OWN = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "OMP_NUM_THREADS", "PYTHONBREAKPOINT")


@dataclass(frozen=True)
class Command:
    """The laptop's command line, and its terminal.

    Attributes:
        module: As after ``python -m``; `None`: it is the script.
        script: A path, absolute or relative to `inside`.
        inside: Where it is started, within the working directory that is sent.
        directory: The sweep's, absolute or relative to the home directory.
        terminal: Its kind, lines and columns; `None` if the output goes elsewhere.
    """

    module: str | None
    script: str
    inside: str
    arguments: list[str]
    directory: str
    terminal: tuple[str, int, int] | None


class Head:
    """Actor on the cluster's head that runs the sweep as a process."""

    def __init__(self) -> None:
        self._output: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._readers: list[threading.Thread] = []

    def start(self, command: Command) -> str | None:
        """Start the process; return what is missing for it, if anything."""
        context = ray.get_runtime_context()
        runtime_env = dict(context.runtime_env)
        root = Path.cwd() if "working_dir" in runtime_env else Path.home()
        directory = root / command.inside
        program = _program(command, directory)
        if program is None:
            return f"{command.module or command.script} is not there ({directory})"
        sent = SubmittedSweep(context.gcs_address, runtime_env, command.directory)
        self._files = SweepFiles(sent.place)
        environment = {k: v for k, v in os.environ.items() if k not in _OWN} | sent.variable()
        if command.terminal is not None:
            environment["TERM"], *size = command.terminal
            streams = [(1, *_open_terminal(*size))]
        else:
            streams = [(1, *os.pipe()), (2, *os.pipe())]
        self._process = subprocess.Popen(
            [sys.executable, *program, *command.arguments],
            stdin=subprocess.PIPE,  # closed when this process ends, which ends the sweep
            cwd=directory,
            env=environment,
            start_new_session=True,
            stdout=streams[0][-1],
            stderr=streams[-1][-1],
        )
        for number, outer, inner in streams:
            os.close(inner)
            reader = threading.Thread(target=self._read_from, args=(number, outer), daemon=True)
            reader.start()
            self._readers.append(reader)
        return None

    def output(self) -> tuple[list[tuple[int, bytes]], int | None]:
        """New output by file descriptor (1 or 2), and the exit code if the process has ended."""
        code, written = self._process.poll(), []
        if code is None:
            with suppress(queue.Empty):
                written.append(self._output.get(timeout=_WAIT_SECONDS))
        for reader in self._readers if code is not None else ():
            reader.join(_DRAIN_SECONDS)
        while not self._output.empty():
            written.append(self._output.get())
        return written, code

    def interrupt(self, signum: int) -> None:
        """Send a signal, such as SIGINT for Ctrl-C."""
        self._process.send_signal(signum)

    def files(self) -> tuple[str, list[File]]:
        """The sweep's directory, and its files to download."""
        return str(self._files.place), self._files.listed()

    def read(self, path: str, offset: int) -> bytes:
        """Read a part of a file; empty at its end."""
        return self._files.read(path, offset)

    def _read_from(self, number: int, descriptor: int) -> None:
        with suppress(OSError):  # as a terminal ends
            while text := os.read(descriptor, 2**16):
                self._output.put((number, text))
        os.close(descriptor)


def _program(command: Command, directory: Path) -> list[str] | None:
    if command.module is not None:
        known = importlib.util.find_spec(command.module.partition(".")[0])
        return None if known is None else ["-m", command.module]
    installed = Path(sys.executable).with_name(Path(command.script).name)
    for path in (directory / command.script, installed):
        if path.is_file():
            return [command.script if path != installed else str(path)]
    return None


def _open_terminal(lines: int, columns: int) -> tuple[int, int]:
    """Open both ends of a terminal of the given size."""
    import fcntl  # not on every laptop
    import pty
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return outer, inner
