"""Where a process of the worker pool stands, in Lightning's terms."""

from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

from lightning_mgpu.launch import Rank

__all__: list[str] = []


class PoolEnvironment(ClusterEnvironment):
    """Ranks on one machine that our own pool launches; reads and writes no environment variable.

    Between launches it answers for rank 0, the calling process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank: Rank | None = None
        self._world_size = 1

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return False

    @property
    @override
    def main_address(self) -> str:
        return self.rank.host if self.rank is not None else "127.0.0.1"

    @property
    @override
    def main_port(self) -> int:
        """Port of the launch in progress, 0 between launches: each launch has its own."""
        return self.rank.port if self.rank is not None else 0

    @staticmethod
    @override
    def detect() -> bool:
        return False

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
    def set_global_rank(self, rank: int) -> None:
        """Nothing to do: the rank comes with the launch."""

    @override
    def local_rank(self) -> int:
        return self.rank.rank if self.rank is not None else 0

    @override
    def node_rank(self) -> int:
        return 0
