"""Ranks of workers, as a Lightning cluster environment."""

from typing_extensions import override

from lightning_mgpu.ray.ranks import RankAssignment
from lightning_mgpu.strategies.ranks.environment import LaunchedEnvironment


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
