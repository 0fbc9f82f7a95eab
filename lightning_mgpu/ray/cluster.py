"""Resources of a Ray cluster, and reservations of them."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from lightning_mgpu._compat.ray import is_of_group
from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray.connection import is_ours

log = logging.getLogger(__name__)

# How long resources may take to become free, or a cluster to grow; a warning comes soon.
_RESOURCES_SECONDS = 600.0
_WARNING_SECONDS = 5.0
# On a cluster of our own nobody but this driver can free anything.
_OWN_CLUSTER_SECONDS = 20.0
# How long to wait for more workers than there have to be: what somebody has just given back takes
# a moment to become free. And then, for each number less.
_SETTLE_SECONDS = 5.0
_NEXT_SECONDS = 1.0


def fits(bundles: list[dict[str, float]], free: bool = False) -> bool:
    """Return whether the living nodes have room for all `bundles`, each on one node.

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
    """Reserve equal bundles for as many workers as the cluster has room for.

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
    """Format resources for a message: ``CPU: 2, GPU: 1``."""
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
    """Return whether nodes with these resources have room for all `bundles`, each on one node."""
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
    """Number of such bundles that fit on the living nodes when nothing else runs."""
    return _count(bundle, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]])


def _count(bundle: dict[str, float], nodes: list[dict[str, Any]]) -> int:
    return next(count for count in itertools.count() if not _take_one(bundle, nodes))
