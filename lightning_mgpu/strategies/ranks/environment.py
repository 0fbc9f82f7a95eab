"""Cluster environments of processes that we launch."""

from abc import ABC

from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

from lightning_mgpu.launch.rank import LOOPBACK, Rank


class LaunchedEnvironment(ClusterEnvironment, ABC):
    """Environment of a rank that we launched; reads and writes no environment variable."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return False

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the rank comes with the launch."""


class PoolEnvironment(LaunchedEnvironment):
    """Environment of ranks on one machine that our pool launches.

    Between launches it answers for rank 0, the calling process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank: Rank | None = None
        self._world_size = 1

    @property
    @override
    def main_address(self) -> str:
        return self.rank.host if self.rank is not None else LOOPBACK

    @property
    @override
    def main_port(self) -> int:
        """Port of the launch in progress, 0 between launches: each launch has its own."""
        return self.rank.port if self.rank is not None else 0

    @override
    def world_size(self) -> int:
        return self.rank.world_size if self.rank is not None else self._world_size

    @override
    def set_world_size(self, size: int) -> None:
        self._world_size = size

    @override
    def global_rank(self) -> int:
        return self.local_rank()

    @override
    def local_rank(self) -> int:
        return self.rank.rank if self.rank is not None else 0

    @override
    def node_rank(self) -> int:
        return 0
