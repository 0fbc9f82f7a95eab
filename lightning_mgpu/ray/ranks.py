"""Where a worker stands among the others, in Lightning's terms."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.strategies.ranks.environment import LaunchedEnvironment


@dataclass(frozen=True, kw_only=True)
class Place(Rank):
    """One worker's ranks, and where the ranks meet."""

    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int


def places(nodes: list[str]) -> list[Place]:
    """The place of each worker, given the node on which it runs."""
    order = list(dict.fromkeys(nodes))
    return [
        Place(
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
    """What tells this machine (or container) from others: they share no files, or so we assume."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else os.getuid()}"


class RayEnvironment(LaunchedEnvironment):
    """Ranks that Ray has placed. On the driver it answers for rank 0 of all workers.

    Args:
        num_workers: How many there will be.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.place = Place(
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
        """Nothing to do: the number of workers is the strategy's."""

    @override
    def global_rank(self) -> int:
        return self.place.rank

    @override
    def local_rank(self) -> int:
        return self.place.local_rank

    @override
    def node_rank(self) -> int:
        return self.place.node_rank
