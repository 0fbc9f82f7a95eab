"""Resources for which others on the cluster wait, from Ray's autoscaler state."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from lightning_mgpu._compat.ray import cluster_state
from lightning_mgpu.ray.cluster import fit_on

# How often to look. Ray's nodes report what waits for them once a second.
_SECONDS = 0.5
# A request that seems to have room may be about to start; after so many looks it will not.
_PATIENCE = 4

Bundles = list[dict[str, float]]
"""Resources of one request: a task's or actor's, or all bundles of a placement group."""


def wait(held: Iterable[str], seconds: float, is_over: Callable[[], bool]) -> bool:
    """Wait, in an actor, until somebody else wants some of the resources that idle workers hold.

    Args:
        held: Names of these resources.
        seconds: How long to wait.
        is_over: Whether the workers are idle no longer.

    Returns:
        Whether this version of Ray says what others wait for. If not, nothing has been waited for.
    """
    names, lingering = frozenset(held), 0
    deadline = time.monotonic() + seconds
    while not is_over() and time.monotonic() < deadline:
        try:
            requests, nodes = snapshot()
        except (ImportError, AttributeError):  # all of it is private
            return False
        except Exception:  # the control service is busy, or on its way out
            requests, nodes = [], []
        wanted = [request for request in requests if _concerns(request, names, nodes)]
        lingering = lingering + 1 if wanted else 0
        free = [free for free, _ in nodes]
        if lingering > _PATIENCE or any(not fit_on(request, free) for request in wanted):
            return True
        time.sleep(_SECONDS)
    return True


def snapshot() -> tuple[list[Bundles], list[tuple[dict[str, float], dict[str, float]]]]:
    """Pending requests, and the free and total resources of each living node."""
    state = cluster_state()
    single = [[_plain(each.request)] for each in state.pending_resource_requests if each.count]
    gangs = [
        [_plain(request) for request in gang.requests]
        for gang in state.pending_gang_resource_requests
    ]
    nodes = [
        (dict(node.available_resources), dict(node.total_resources))
        for node in state.node_states
        if node.total_resources
    ]
    return [*single, *gangs], nodes


def _plain(request: Any) -> dict[str, float]:
    return dict(request.resources_bundle)


def _concerns(
    request: Bundles,
    held: frozenset[str],
    nodes: list[tuple[dict[str, float], dict[str, float]]],
) -> bool:
    """Return whether a request names a held resource and could ever be fulfilled."""
    names = {name for bundle in request for name, amount in bundle.items() if amount}
    return bool(names & held) and fit_on(request, [total for _, total in nodes])
