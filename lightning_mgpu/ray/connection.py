"""Connect this process to a Ray cluster, or start one: one connection per process."""

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from lightning_mgpu._compat.ray import files_in, read_token_mode
from lightning_mgpu.errors import one_line
from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray.address import LOCAL, address_of, given
from lightning_mgpu.variables import restored

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ray's sockets lie some 70 characters further down, and a socket's path ends at 107.
_LONGEST_DIRECTORY = 30
_SHORT_DIRECTORY = 20  # so that a name of its own can be added
_SHORTEST = "/tmp"  # on every Linux
_CONNECT_SECONDS = 10.0
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
# Where the user has not said otherwise: no warning of how Ray treats GPUs, no report of usage.
_VARIABLES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class _Made:
    """A connection made by this module; it is gone when the program shuts Ray down."""

    connection: str
    ours: bool
    asked: dict[str, Any]


_made: _Made | None = None
_files: Path | None = None  # of a cluster of our own, for as long as `connected` lasts


def connection() -> str | None:
    """Identifier of this process's connection to a cluster; `None` if there is none.

    Actors, placement groups and objects of another connection are gone, or nobody's.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return f"{context.get_node_id()} {context.get_job_id()}"


def _own() -> _Made | None:
    """The connection if it was made here, and nobody has shut it down since."""
    return _made if _made is not None and _made.connection == connection() else None


def connect(options: Mapping[str, Any] | None = None) -> None:
    """Connect to the cluster, or start one.

    A connection that is there already is used, an address among the options, or one that the user
    named in ``RAY_ADDRESS``, as ``ray job submit`` does. Otherwise a cluster of our own is started,
    on this machine and with Ray's token authentication: `ray.init` by itself would join whatever
    cluster it finds here.

    Args:
        options: Arguments of `ray.init`; those that are `None` do not count.

    Raises:
        LaunchError: There is no cluster at the address, or this process uses another one.
    """
    asked = given(options or {})
    if ray.is_initialized():
        _refuse_another(asked)
        return
    with signal_handlers_kept():
        _init({"logging_level": logging.WARNING, **asked})


@contextmanager
def connected(options: Mapping[str, Any]) -> Iterator[None]:
    """Connect for the length of the block; an existing connection is used as it is.

    Ray says little, and of a cluster of our own nothing stays: neither files nor variables.

    Args:
        options: As those of `connect`.

    Raises:
        LaunchError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    global _files
    where = tempfile.gettempdir()
    with (
        _environment(),
        tempfile.TemporaryDirectory(
            prefix="ray-",
            dir=where if len(where) < _SHORT_DIRECTORY else _SHORTEST,
            ignore_cleanup_errors=True,
        ) as directory,
    ):
        own = files_in(directory) if address_of(options) == LOCAL else {}
        _files = Path(directory)
        try:
            _init({**_QUIET, **own, **given(options)})
            yield
        finally:
            ray.shutdown()
            _files = None


def remove_files() -> None:
    """Remove the files of `connected` before the process ends without leaving its block."""
    if _files is not None:
        shutil.rmtree(_files, ignore_errors=True)


def _init(options: dict[str, Any]) -> None:
    global _made
    address = address_of(options)
    arguments = {name: value for name, value in options.items() if name != "address"}
    if address == LOCAL:
        turn_authentication_on()
        own = {"include_dashboard": False, **files_in(_directory())}
        ray.init(address, **{**own, **arguments})
    else:
        _refuse_resources(address, options)
        _join(address, arguments)
    here = connection()
    assert here is not None
    _made = _Made(here, address == LOCAL, options)


def _join(address: str, options: Mapping[str, Any]) -> None:
    log.info("Joining the Ray cluster at %s.", address)
    try:
        reach(address)
        ray.init(address, **options)
    except ConnectionAbortedError as error:
        # Where it forks for that among the threads of gRPC, the fork may fail.
        raise LaunchError(
            f"The Ray cluster at {address} could not start its server for this client"
            f" ({one_line(error, 300)}). Try again; its ray_client_server*.err say more. If they"
            " end with a fork, start the head with GRPC_ENABLE_FORK_SUPPORT=0 in its environment."
        ) from error
    except OSError as error:  # Ray's own is a ConnectionError
        raise LaunchError(
            f"There is no Ray cluster at {address} ({one_line(error, 300)}). Start"
            " one with `ray start --head`; set RAY_AUTH_MODE=token if it requires a token."
        ) from error


def reach(address: str) -> None:
    """Check that an address accepts connections; Ray itself would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


def _refuse_another(asked: Mapping[str, Any]) -> None:
    """Refuse a second cluster: a program has one connection at a time."""
    made = _own()
    if made is None:
        return
    wanted = {name: value for name, value in asked.items() if made.asked.get(name) != value}
    if wanted:
        raise LaunchError(
            f"This process uses Ray already, but not with {wanted}. Call `ray.shutdown()` first."
        )


def _refuse_resources(address: str, asked: Mapping[str, Any]) -> None:
    """Refuse options for the resources of a cluster that runs already."""
    for name in ("num_cpus", "num_gpus"):
        if name in asked:
            raise LaunchError(
                f"{name}={asked[name]}: the resources of the cluster at {address} are fixed when it"
                " is started. Remove this option, or the address."
            )


def is_ours() -> bool:
    """Return whether the cluster was started here, so that it will never get more nodes."""
    made = _own()
    return made is not None and made.ours


def turn_authentication_on() -> None:
    """Turn on token authentication, as later versions of Ray do, unless the user chose."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        try:
            read_token_mode()
        except Exception:
            del os.environ["RAY_AUTH_MODE"]  # or the next attempt would take it for the user's
            raise


def _directory() -> str | None:
    """Directory of Ray's files; `None` for Ray's default."""
    directory = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or ""
    return None if len(directory) <= _LONGEST_DIRECTORY else f"{_SHORTEST}/ray"


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Context that restores signal handlers: Ray replaces SIGTERM's, which ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _environment() -> Iterator[None]:
    """Context that restores environment variables, which `ray.init` reads and sets."""
    with restored():
        for name, value in _VARIABLES.items():
            os.environ.setdefault(name, value)
        yield
