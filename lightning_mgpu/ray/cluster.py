"""The Ray cluster that this process works on: found, or started for it alone."""

import itertools
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from lightning_mgpu._compat.ray import files_in, is_of_group, read_token_mode
from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray.address import LOCAL, address_of, given

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ray's sockets lie some 70 characters further down, and a socket's path ends at 107.
_LONGEST_DIRECTORY = 30

_CONNECT_SECONDS = 10.0
# How long resources may take to become free, or a cluster to grow; a warning comes soon.
_RESOURCES_SECONDS = 600.0
_WARNING_SECONDS = 5.0
# On a cluster of our own nobody but this driver can free anything.
_OWN_CLUSTER_SECONDS = 20.0
# How long to wait for more workers than there have to be: what somebody has just given back takes
# a moment to become free. And then, for each number less.
_SETTLE_SECONDS = 5.0
_NEXT_SECONDS = 1.0


@dataclass(frozen=True)
class _Made:
    """A connection that `connect` has made. It is gone when the program shuts Ray down."""

    connection: str
    ours: bool
    asked: dict[str, Any]


_made: _Made | None = None


def connection() -> str | None:
    """Tells this process's connection to a cluster from all others; `None` if there is none.

    Actors, placement groups and objects of another connection are gone, or nobody's.
    """
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return f"{context.get_node_id()} {context.get_job_id()}"


def _own() -> _Made | None:
    """The connection if `connect` has made it, and nobody has shut it down since."""
    return _made if _made is not None and _made.connection == connection() else None


def connect(options: Mapping[str, Any] | None = None) -> None:
    """See to it that Ray runs.

    A connection that is there already is used, an address among the options, or one that the user
    named in ``RAY_ADDRESS``, as ``ray job submit`` does. Otherwise a cluster of our own is started,
    on this machine and with Ray's token authentication: `ray.init` by itself would join whatever
    cluster it finds here.

    Args:
        options: Arguments of `ray.init`; those that are `None` do not count.

    Raises:
        LaunchError: There is no cluster at the address, or this process uses another one.
    """
    global _made
    asked = given(options or {})
    if ray.is_initialized():
        _refuse_another(asked)
        return
    address = address_of(asked)
    options = {"logging_level": logging.WARNING, **asked}
    options.pop("address", None)
    with signal_handlers_kept():
        if address == LOCAL:
            turn_authentication_on()
            own = {"include_dashboard": False, **files_in(_short_directory())}
            ray.init(address, **{**own, **options})
        else:
            _join(address, options)
    here = connection()
    assert here is not None
    _made = _Made(here, address == LOCAL, asked)


def _join(address: str, options: Mapping[str, Any]) -> None:
    log.info("Joining the Ray cluster at %s.", address)
    try:
        reach(address)
        ray.init(address, **options)
    except ConnectionAbortedError as error:
        # Where it forks for that among the threads of gRPC, the fork may fail.
        raise LaunchError(
            f"The Ray cluster at {address} could not start its server for this client"
            f" ({in_a_line(error)[:300]}). Try again; its ray_client_server*.err say more. If they"
            " end with a fork, start the head with GRPC_ENABLE_FORK_SUPPORT=0 in its environment."
        ) from error
    except OSError as error:  # Ray's own is a ConnectionError
        raise LaunchError(
            f"There is no Ray cluster at {address} ({in_a_line(error)[:300]}). Start"
            " one with `ray start --head`; set RAY_AUTH_MODE=token if it wants a token."
        ) from error


def in_a_line(error: Exception) -> str:
    """What an error says."""
    return " ".join(str(error).split())


def reach(address: str) -> None:
    """See whether somebody listens at an address, where Ray would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


def _refuse_another(asked: Mapping[str, Any]) -> None:
    """A program has one connection: where we have made it, another cannot be asked for."""
    made = _own()
    if made is None:
        return
    wanted = {name: value for name, value in asked.items() if made.asked.get(name) != value}
    if wanted:
        raise LaunchError(
            f"This process uses Ray already, but not with {wanted}. Call `ray.shutdown()` first."
        )


def is_ours() -> bool:
    """Whether the cluster was started by `connect`, so that nobody will ever add nodes to it."""
    made = _own()
    return made is not None and made.ours


def fits(bundles: list[dict[str, float]], free: bool = False) -> bool:
    """Whether the living nodes have room for all `bundles`, each on one node.

    Args:
        bundles: What is asked for.
        free: Count what is free now, over the whole cluster, instead of what there is.
    """
    if free:
        return fit_on(bundles, [ray.available_resources()])
    return fit_on(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def reserve(
    bundle: dict[str, float], least: int, most: int, placement: str = "PACK"
) -> PlacementGroup:
    """Reserve equal bundles, one for each worker: as many as the cluster can give by now.

    Args:
        bundle: What each worker needs.
        least: Number of bundles to wait for, if there is not even room for them.
        most: Number of bundles that are enough.
        placement: Ray's strategy for their nodes, such as ``"PACK"`` or ``"SPREAD"``.

    Raises:
        LaunchError: The cluster has too little; the message says what was asked for.
    """
    count, seconds = min(most, _capacity(bundle)), _SETTLE_SECONDS
    while count > least:
        reservation = _try([bundle] * count, placement, seconds)
        if reservation is not None:
            return reservation
        free = _count(bundle, [dict(ray.available_resources())])
        # (What is free over all nodes may not lie together on one.)
        count, seconds = min(count - 1, max(free, least)), _NEXT_SECONDS
    return _wait_for([bundle] * least, placement)


def _wait_for(bundles: list[dict[str, float]], placement: str) -> PlacementGroup:
    asked = f"{len(bundles)} × ({describe(bundles[0])})"
    if placement != "PACK":
        asked += f" with placement {placement}"
    if is_ours() and not fits(bundles):
        raise LaunchError(_too_little(asked))
    reservation: PlacementGroup = placement_group(bundles, strategy=placement)
    try:
        if not reservation.wait(_WARNING_SECONDS):
            log.warning("Waiting for resources. %s", _too_little(asked))
            seconds = _OWN_CLUSTER_SECONDS if is_ours() else _RESOURCES_SECONDS
            if not reservation.wait(seconds):
                raise LaunchError(_too_little(asked))
    except BaseException:
        remove_placement_group(reservation)
        raise
    return reservation


def _try(bundles: list[dict[str, float]], placement: str, seconds: float) -> PlacementGroup | None:
    reservation: PlacementGroup = placement_group(bundles, strategy=placement)
    ready = False
    try:
        ready = reservation.wait(seconds)
    finally:
        if not ready:
            remove_placement_group(reservation)
    return reservation if ready else None


def describe(resources: Mapping[str, float]) -> str:
    """Resources as a person writes them: ``CPU: 2, GPU: 1``."""
    # Ray lists its nodes' addresses and its memory among them.
    wanted = {
        name: amount
        for name, amount in sorted(resources.items())
        if amount
        and ":" not in name
        and not name.startswith(("object_store", "memory", "bundle"))
        and not is_of_group(name)
    }
    return ", ".join(f"{name}: {amount:g}" for name, amount in wanted.items()) or "nothing"


def _too_little(asked: str) -> str:
    nodes: Sequence[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    has = "; ".join(describe(node["Resources"]) for node in nodes)
    free = describe(ray.available_resources())
    return (
        f"The workers ask for {asked}, and the cluster has {len(nodes)} node"
        f"{'' if len(nodes) == 1 else 's'} ({has}), of which free: {free}. Ask for fewer workers"
        " (`num_workers`) or less for each (`num_cpus_per_worker`, `resources_per_worker`), or"
        " start Ray with more: `ray.init(num_cpus=...)`."
    )


def fit_on(bundles: list[dict[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether nodes with these resources have room for all `bundles`, each on one node."""
    left = [dict(node) for node in nodes]
    return all(_take_one(bundle, left) for bundle in bundles)


def _take_one(bundle: dict[str, float], nodes: list[dict[str, Any]]) -> bool:
    for node in nodes:
        if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] = node.get(name, 0) - amount
            return True
    return False


def _capacity(bundle: dict[str, float]) -> int:
    """For how many such bundles the living nodes have room, were they all free."""
    return _count(bundle, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]])


def _count(bundle: dict[str, float], nodes: list[dict[str, Any]]) -> int:
    return next(count for count in itertools.count() if not _take_one(bundle, nodes))


def turn_authentication_on() -> None:
    """Ray's later versions do so themselves; a choice of the user's stands."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        try:
            read_token_mode()
        except Exception:
            del os.environ["RAY_AUTH_MODE"]  # or the next attempt would take it for the user's
            raise


def _short_directory() -> str | None:
    directory = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or ""
    return None if len(directory) <= _LONGEST_DIRECTORY else str(Path("/tmp") / "ray")


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
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
