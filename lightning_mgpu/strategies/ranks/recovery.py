"""Go on with training when a rank's process is lost, from a snapshot of the run."""

import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning import Callback
from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.lightning_trainer import begin_again, resumed_from
from lightning_mgpu.launch.errors import WorkerDiedError
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.ranks.run_snapshots import RunSnapshots
from lightning_mgpu.strategies.resume.exact_resume import ExactResume

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import Trainer

log = logging.getLogger(__name__)

# At a time there are the last one and the one that is being written; each holds the parameters and
# at most two moments of the optimizer. The rest is for other programs.
_SNAPSHOTS, _COPIES = 4, 3
_IN_MEMORY = Path("/dev/shm")


class Recovery:
    """Runs `fit` again from a snapshot when a rank's process is lost.

    Args:
        max_failures: How often.
        every_n_steps: Optimizer steps between two snapshots.
    """

    def __init__(self, max_failures: int, every_n_steps: int) -> None:
        self._max_failures, self._every_n_steps = max_failures, every_n_steps

    def run(
        self,
        trainer: "Trainer",
        launch: Callable[..., Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what ``launch(function, args, kwargs)`` does.

        Args:
            trainer: The Trainer, about to fit.
            launch: Runs a function on all ranks.
            function: The Trainer's function that fits.
            args: Its arguments.
            kwargs: The same by name.

        Raises:
            WorkerDiedError: Once too often, or before training has begun.
        """
        modes = {module: module.training for module in trainer.lightning_module.modules()}
        place = tempfile.TemporaryDirectory(prefix="lightning_mgpu_", dir=_roomy(trainer))
        with place as directory, ExitStack() as stack:
            snapshots = RunSnapshots(self._every_n_steps, Path(directory))
            stack.callback(snapshots.close)
            stack.enter_context(_added(trainer, snapshots))
            for failures in itertools.count(1):
                try:
                    return launch(function, args, kwargs)
                except WorkerDiedError as error:
                    latest = snapshots.latest()
                    if failures > self._max_failures or latest is None:
                        raise
                    log.warning(
                        "%s. Training goes on from %s with new processes (failure %d of at most"
                        " %d).",
                        *(error, latest.stem.replace("-", " "), failures, self._max_failures),
                    )
                    for callback in callbacks_of(trainer):  # whatever they have set up
                        callback.on_exception(trainer, trainer.lightning_module, error)
                args, kwargs = resumed_from(function, args, kwargs, str(latest))
                begin_again(trainer)
                for module, training in modes.items():  # it may have been in validation
                    module.training = training
        raise AssertionError


@contextmanager
def _added(trainer: "Trainer", snapshots: RunSnapshots) -> Iterator[None]:
    """The Trainer with what snapshots take; as it was after the block."""
    before = list(callbacks_of(trainer))
    own: list[Callback] = [snapshots]
    if not any(isinstance(callback, ExactResume) for callback in before):
        own.insert(0, ExactResume())
    assign(trainer, "callbacks", [*before, *own])
    try:
        yield
    finally:
        kept = [callback for callback in callbacks_of(trainer) if callback not in own]
        assign(trainer, "callbacks", kept)


def _roomy(trainer: "Trainer") -> str | None:
    """A directory in memory, if there is room enough; `None` for the usual one on disk."""
    parameters = sum(p.nbytes for p in trainer.lightning_module.parameters())
    needed = _SNAPSHOTS * _COPIES * parameters
    if _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > needed:
        return str(_IN_MEMORY)
    return None
