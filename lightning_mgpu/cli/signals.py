"""Stop a run on SIGINT or SIGTERM and save a checkpoint."""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The run was stopped by a signal. Like `KeyboardInterrupt`, it is not an `Exception`.

    Attributes:
        signum: The signal.
        checkpoint: Where the training state was saved; `None` if there was none to save.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        super().__init__(signal.Signals(signum).name)


class StopOnSignal(Callback):
    """Stop the run after the current batch on SIGINT or SIGTERM, and save a checkpoint.

    A second signal ends it at once; the checkpoint may then hold half an optimizer step. Use it
    as a context manager around the Trainer's calls, and as a callback of the Trainer. Outside the
    main thread, where Python lets nobody set signal handlers, it does nothing.

    Args:
        path: Where to save the checkpoint of an interrupted `fit`; `None` to save none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._signum: int | None = None
        self._saved: Path | None = None
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self.at_once = False
        """Whether to end at the first signal: where no batch is trained in this process."""

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
            self._listen()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        if self._signum is not None and not isinstance(error, Stopped):
            # Lightning has turned it into something else, or the run was over by then.
            raise Stopped(self._signum, self._saved) from error
        if isinstance(error, Stopped):
            error.checkpoint = self._saved

    def __getstate__(self) -> dict[str, Any]:
        # Rank 0 alone listens; handlers do not pickle.
        return {**self.__dict__, "_previous": {}}

    def _listen(self) -> None:
        if self._previous:
            for signum in _SIGNALS:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader's process, forked from ours: Ctrl-C reaches it too, and we end it
        if self._signum is not None:
            raise Stopped(self._signum)
        self._signum = signum
        if self.at_once:
            raise Stopped(signum)
        log.warning(
            "%s: stopping after this batch; send it again to stop at once.",
            signal.Signals(signum).name,
        )

    def _stop_if_asked(self) -> None:
        if self._signum is not None:
            raise Stopped(self._signum)

    # Lightning puts its own SIGTERM handler in front of ours when a run begins.

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()
        self._stop_if_asked()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._stop_if_asked()

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._stop_if_asked()

    @override
    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self._stop_if_asked()

    @override
    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self._stop_if_asked()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._signum is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if self._path is None:
            return
        if trainer.global_step == 0:
            return  # nothing learnt yet, and the optimizers may not exist
        trainer.save_checkpoint(self._path)
        self._saved = self._path
