"""Sends a sweep from a laptop to a cluster by Ray Client, shows how it goes, and brings it home."""

import codecs
import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from lightning_mgpu.errors import ConfigError, SweepFailedError
from lightning_mgpu.ray.cluster import connect
from lightning_mgpu.ray.sweep.cluster import QUIET, refuse_resources
from lightning_mgpu.ray.sweep.download import download
from lightning_mgpu.ray.sweep.head import HEAD, Command, Head
from lightning_mgpu.ray.sweep.job import program
from lightning_mgpu.ray.sweep.results import resume_command
from lightning_mgpu.ray.sweep.sweep import Sweep, holds_sweep

__all__: list[str] = []

log = logging.getLogger(__name__)

_LOST = (ConnectionError, RayError)


def run_on_cluster(sweep: Sweep, address: str) -> None:
    """Run a sweep that has been checked, to its end, on the cluster at `address`.

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
            f"hydra.sweep.dir={named}: {home} holds a sweep already, and the new one's files would"
            " come there. Choose another directory."
        )
    with _connected({**QUIET, **sweep.options.ray, "address": address}):
        head = _start(_command(named, sweep.options.ray), address)
        try:
            code = _follow(head)
            download(head, home)
        except _LOST as error:
            raise SweepFailedError(
                f"The cluster at {address} was lost ({_in_a_line(error)}). The"
                f" sweep ends there and keeps its files. Go on with: {resume_command(Path(named))}"
            ) from error
    if code < 0:
        raise SweepFailedError(
            f"The sweep's own process on the cluster was killed (signal {-code}). Go on with:"
            f" {resume_command(Path(named))}"
        )
    if code:
        sys.exit(code)


def _start(command: Command, address: str) -> Any:
    """The actor that runs the command there."""
    where = f"hydra.sweeper.ray.address={address}"
    head: Any = ray.remote(num_cpus=0, resources={HEAD: 1e-3})(Head).remote()
    try:
        missing = ray.get(head.start.remote(command))
    except _LOST as error:
        raise ConfigError(
            f"{where}: the sweep cannot start there ({_in_a_line(error)}). Every machine needs"
            " the same versions of Python, Ray and this package."
        ) from error
    if missing is not None:
        raise ConfigError(
            f"{where}: {missing}. Send your project along by"
            " hydra.sweeper.ray.runtime_env.working_dir=."
        )
    return head


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _directory(sweep: Sweep) -> str:
    named = os.path.normpath(sweep.options.resume or sweep.job.config.hydra.sweep.dir)
    if named.startswith(os.pardir):
        raise ConfigError(
            f"hydra.sweep.dir={named}: lies on the cluster, where that is nowhere. Name an absolute"
            " path, or one below the home directory there."
        )
    return named


@contextlib.contextmanager
def _connected(given: Mapping[str, Any]) -> Iterator[None]:
    """A connection for the length of the block, unless there is one already."""
    if ray.is_initialized():
        yield
        return
    refuse_resources(given)
    try:
        connect(given)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra.sweeper.ray: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _command(named: str, given: Mapping[str, Any]) -> Command:
    """This command line, as the cluster can start it."""
    _, *rest = program()
    module = rest[-1] if len(rest) > 1 else None
    script = Path(sys.argv[0]).absolute()
    sent = (given.get("runtime_env") or {}).get("working_dir") or os.curdir
    root = Path(sent).absolute()
    if script.is_relative_to(root):
        script = script.relative_to(root)
    size = None
    if sys.stdout.isatty():
        columns, lines = shutil.get_terminal_size()
        size = (os.environ.get("TERM", "xterm"), lines, columns)
    return Command(module, str(script), sys.argv[1:], named, size)


def _follow(head: Any) -> int:
    """Pass on what the sweep writes there, and Ctrl-C from here; its exit code."""
    decoder = codecs.getincrementaldecoder("utf-8")
    streams = {1: (sys.stdout, decoder("replace")), 2: (sys.stderr, decoder("replace"))}
    with _interrupts() as interrupts:
        while True:
            written, code = ray.get(head.output.remote())
            for number, text in written:
                stream, decode = streams[number]
                stream.write(decode.decode(text))
                stream.flush()
            if code is not None:
                return int(code)
            while interrupts:
                interrupts.pop()
                ray.get(head.interrupt.remote())


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C adds to a list, instead of ending this process in the middle of a call."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda signum, _: seen.append(signum))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
