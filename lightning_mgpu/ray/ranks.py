"""Ranks of workers, and the machines that they are on.

Imports nothing of Lightning: workers import this before they know which of its packages is in use.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from lightning_mgpu.launch.rank import Rank


@dataclass(frozen=True, kw_only=True)
class RankAssignment(Rank):
    """Ranks of one worker, and the address where the ranks meet."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


def places(nodes: list[str]) -> list[RankAssignment]:
    """Assign ranks to workers, given the node on which each runs."""
    order = list(dict.fromkeys(nodes))
    return [
        RankAssignment(
            rank=rank,
            world_size=len(nodes),
            local_rank=nodes[:rank].count(node),
            local_world_size=nodes.count(node),
            node_rank=order.index(node),
            num_nodes=len(order),
        )
        for rank, node in enumerate(nodes)
    ]


def machine() -> str:
    """Identifier of this machine or container, which is assumed to share no files with others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else os.getuid()}"
