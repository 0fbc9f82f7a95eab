"""Base class of strategies whose processes compute a step on several devices each."""

from abc import ABC, abstractmethod

from typing_extensions import override

from lightning_mgpu._compat.lightning import ParallelStrategy, Trainer
from lightning_mgpu.engine.randomness import RandomStreams
from lightning_mgpu.strategies.base.belonging import Belonging
from lightning_mgpu.strategies.base.checks import check_layer_sync, check_module


class MultiDeviceStrategy(Belonging, ParallelStrategy, ABC):
    """Several devices in one process: refuses what cannot run there, and stops its threads."""

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        check_layer_sync(type(self).__name__, self._layer_sync is not None)
        check_module(type(self).__name__, self.lightning_module)
        self._release()
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        self._release()
        super().teardown()

    @abstractmethod
    def random_streams(self) -> RandomStreams:
        """The random numbers of the run's steps; made if they have not been needed so far."""

    @abstractmethod
    def _release(self) -> None:
        """Release threads and all else that a run has set up."""
