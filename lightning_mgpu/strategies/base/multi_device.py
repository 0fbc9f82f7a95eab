"""What strategies have in common whose processes each compute a step in parts."""

from abc import ABC, abstractmethod

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from lightning_mgpu.strategies.base.checks import check_layer_sync, check_module


class InParts(ParallelStrategy, ABC):
    """Several devices in one process: refuses what cannot be computed so, and ends its threads."""

    strategy_name: str

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        check_layer_sync(self.strategy_name, self._layer_sync is not None)
        check_module(self.strategy_name, self.lightning_module)
        self._release()
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        self._release()
        super().teardown()

    @abstractmethod
    def _release(self) -> None:
        """Let go of threads and of all else that a run has set up."""
