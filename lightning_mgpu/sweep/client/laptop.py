"""Submit a sweep to a cluster through Ray Client, and show its output."""

import codecs
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import RayError, RayTaskError

from lightning_mgpu._compat.ray import HEAD
from lightning_mgpu.errors import ConfigError, SweepFailedError, one_line
from lightning_mgpu.ray.address import source_of
from lightning_mgpu.sweep.client.download import download
from lightning_mgpu.sweep.client.head import Command, Head
from lightning_mgpu.sweep.driver.sweep_connection import connected_to_ray
from lightning_mgpu.sweep.job.job import program
from lightning_mgpu.sweep.settings.prepared import PreparedSweep, holds_sweep
from lightning_mgpu.sweep.store.results import resume_command

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


def run_on_cluster(sweep: PreparedSweep) -> None:
    """Run a checked sweep to its end on the cluster that its options name.

    Its directory is the cluster's; a relative path begins at the home directory there. All but
    the checkpoints comes home, to the same relative path, or to the last name of an absolute one.

    Raises:
        ConfigError: The cluster cannot be reached, or lacks something.
        SweepFailedError: The connection was lost, or the sweep was killed.
        SystemExit: The sweep did not end well; it has said why.
    """
    named = _directory(sweep)
    home = Path(named if not os.path.isabs(named) else Path(named).name).absolute()
    if sweep.options.resume is None and holds_sweep(home):
        raise ConfigError(
            f"hydra.sweep.dir={named}: {home} already holds a sweep, and the new one's files"
            " would be downloaded there. Choose another directory."
        )
    where = source_of(sweep.options.ray, "hydra.sweeper.ray.address")
    with connected_to_ray(sweep.options.ray):
        head = _start(_command(named, sweep.options.ray), where)
        try:
            code = _follow(head)
            download(head, home)
        except RayTaskError:  # it is there, and at fault
            raise
        except (ConnectionError, RayError) as error:
            _show_cursor()
            raise SweepFailedError(
                f"{where}: the cluster was lost ({one_line(error, 300)}). The sweep stops"
                f" there and keeps its files. Resume with: {resume_command(Path(named))}"
            ) from error
    if -code in _SIGNALS:  # before it could save anything
        code = 128 - code
    if code < 0:
        _show_cursor()
        raise SweepFailedError(
            f"The sweep's own process on the cluster was killed (signal {-code}). Resume with:"
            f" {resume_command(Path(named))}"
        )
    if code:
        sys.exit(code)


def _directory(sweep: PreparedSweep) -> str:
    named = os.path.normpath(sweep.options.resume or sweep.job.config.hydra.sweep.dir)
    if named.startswith(os.pardir):
        raise ConfigError(
            f"hydra.sweep.dir={named}: leads out of the home directory on the cluster. Give an"
            " absolute path, or one below the home directory there."
        )
    return named


def _start(command: Command, where: str) -> Any:
    """Start the actor that runs the command."""
    try:
        head: Any = ray.remote(num_cpus=0, resources={HEAD: 1e-3})(Head).remote()
        missing = ray.get(head.start.remote(command))
    except (ImportError, AttributeError, ConnectionError, RayError) as error:
        raise ConfigError(
            f"{where}: the sweep cannot start there ({one_line(error, 300)}). Every machine needs"
            " the same versions of Python, Ray and this package."
        ) from error
    if missing is not None:
        raise ConfigError(
            f"{where}: {missing}. Submit your project with"
            " hydra.sweeper.ray.runtime_env.working_dir=."
        )
    return head


def _command(named: str, given: Mapping[str, Any]) -> Command:
    """This command line in the form in which the cluster can start it."""
    _, *rest = program()
    module = rest[-1] if len(rest) > 1 else None
    here, script = Path.cwd().resolve(), Path(sys.argv[0]).resolve()
    sent = Path((given.get("runtime_env") or {}).get("working_dir") or os.curdir).resolve()
    root = sent if sent.is_dir() else here  # an archive or a URI has this directory as its root
    inside = here.relative_to(root) if here.is_relative_to(root) else Path()
    if script.is_relative_to(root):
        script = Path(os.path.relpath(script, root / inside))
    size = None
    if sys.stdout.isatty():
        columns, lines = shutil.get_terminal_size()
        size = (os.environ.get("TERM", "xterm"), lines, columns)
    return Command(module, str(script), str(inside), sys.argv[1:], named, size)


def _follow(head: Any) -> int:
    """Forward the sweep's output, Ctrl-C and SIGTERM; return the exit code."""
    streams = {1: _Echo(sys.stdout), 2: _Echo(sys.stderr)}
    with _interrupts() as interrupts:
        while True:
            written, code = ray.get(head.output.remote())
            for number, text in written:
                streams[number].write(text)
            if code is not None:
                return int(code)
            while interrupts:
                ray.get(head.interrupt.remote(interrupts[0]))
                interrupts.pop(0)


class _Echo:
    """Write pieces of output to a stream as long as it accepts them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, piece: bytes) -> None:
        if self._stream is None:
            return
        text = self._decoder.decode(piece).encode(self._encoding, "replace")
        try:
            self._stream.write(text.decode(self._encoding))
            self._stream.flush()
        except (OSError, ValueError):  # as a pipe that nobody reads: no reason to end a sweep
            self._stream = None


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Context in which Ctrl-C and SIGTERM add to a list instead of interrupting a call.

    When two have not been seen to, a third does end it: the cluster may be gone.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def interrupt(signum: int, _: Any) -> None:
        if len(seen) > 1:
            raise KeyboardInterrupt
        seen.append(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in _SIGNALS}
    try:
        yield seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _show_cursor() -> None:
    """Show the cursor again, which an interrupted live table leaves hidden."""
    if sys.stdout.isatty():
        sys.stdout.write(_SHOW_CURSOR)
