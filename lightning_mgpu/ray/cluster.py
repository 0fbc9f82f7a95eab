"""The Ray cluster that this process works on: found, or started for it alone."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

__all__: list[str] = []

log = logging.getLogger(__name__)

_ADDRESS = "RAY_ADDRESS"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ray's sockets lie some 70 characters further down, and a socket's path ends at 107.
_LONGEST_DIRECTORY = 30

_ours = False


def connect() -> None:
    """See to it that Ray runs.

    A connection that is there already is used, and an address that the user named in
    ``RAY_ADDRESS``, as ``ray job submit`` does. Otherwise a cluster of our own is started, on this
    machine and with Ray's token authentication: `ray.init` by itself would join whatever cluster
    it finds here.
    """
    global _ours
    if ray.is_initialized():
        return
    with _signal_handlers_kept():
        if os.environ.get(_ADDRESS):
            log.info("Joining the Ray cluster at %s=%s.", _ADDRESS, os.environ[_ADDRESS])
            ray.init(logging_level=logging.WARNING)
            return
        _turn_authentication_on()
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=_short_directory(),
        )
        _ours = True


def is_ours() -> bool:
    """Whether the cluster was started by `connect`, so that nobody will ever add nodes to it."""
    return _ours and ray.is_initialized()


def fits(bundles: list[dict[str, float]], free: bool = False) -> bool:
    """Whether the living nodes have room for all `bundles`, each on one node.

    Args:
        bundles: What is asked for.
        free: Count what is free now, over the whole cluster, instead of what there is.
    """
    if free:
        return _take(bundles, [dict(ray.available_resources())])
    return _take(bundles, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]])


def describe(resources: Mapping[str, float]) -> str:
    """Resources as a person writes them: ``CPU: 2, GPU: 1``."""
    # Ray lists its nodes' addresses and its memory among them.
    wanted = {
        name: amount
        for name, amount in sorted(resources.items())
        if amount
        and ":" not in name
        and not name.startswith(("object_store", "memory", "bundle"))
        and "_group_" not in name
    }
    return ", ".join(f"{name}: {amount:g}" for name, amount in wanted.items()) or "nothing"


def _take(bundles: list[dict[str, float]], nodes: list[dict[str, Any]]) -> bool:
    for bundle in bundles:
        for node in nodes:
            if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] = node.get(name, 0) - amount
                break
        else:
            return False
    return True


def _turn_authentication_on() -> None:
    """Ray's later versions do so themselves; a choice of the user's stands."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        # It was read when Ray was imported.
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]


def _short_directory() -> str | None:
    directory = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or ""
    return None if len(directory) <= _LONGEST_DIRECTORY else str(Path("/tmp") / "ray")


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM over, and ends the process by it; that is the program's own business."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
