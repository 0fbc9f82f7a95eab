"""Ranks of workers, as a Lightning cluster environment."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.strategies.ranks.environment import LaunchedEnvironment


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


class RayEnvironment(LaunchedEnvironment):
    """Ranks assigned by the driver, where it answers for rank 0 of all workers.

    Args:
        num_workers: How many there will be.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.place = RankAssignment(
            0,
            num_workers,
            local_rank=0,
            local_world_size=num_workers,
            node_rank=0,
            num_nodes=1,
        )

    @property
    @override
    def main_address(self) -> str:
        return self.place.host

    @property
    @override
    def main_port(self) -> int:
        return self.place.port

    @override
    def world_size(self) -> int:
        return self.place.world_size

    @override
    def set_world_size(self, size: int) -> None:
        """Do nothing: the number of workers is the strategy's."""

    @override
    def global_rank(self) -> int:
        return self.place.rank

    @override
    def local_rank(self) -> int:
        return self.place.local_rank

    @override
    def node_rank(self) -> int:
        return self.place.node_rank
