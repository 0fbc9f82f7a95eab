"""Base of callbacks that set something up for a run."""

from abc import ABC, abstractmethod

from typing_extensions import override

from lightning_mgpu._compat.lightning import Callback, LightningModule, Trainer


class RunCallback(Callback, ABC):
    """Callback that puts everything back at the end of a run, however that ends."""

    @abstractmethod
    def _end_run(self) -> None:
        """Put back what was set up. May be called twice, and without a run."""

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end_run()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_run()
