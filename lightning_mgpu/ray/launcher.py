"""Run the Trainer's entry points on Ray workers and bring their state back."""

import itertools
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.call import _call_teardown_hook
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from lightning_mgpu._compat import hydra
from lightning_mgpu.errors import one_line
from lightning_mgpu.launch.errors import (
    LaunchError,
    WorkerDiedError,
    is_collective_error,
    is_timeout_error,
)
from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.ray import connection, loggers, worker_group
from lightning_mgpu.ray.epoch_checkpoint import Autosave, CheckpointKeeper, Save
from lightning_mgpu.ray.object_store import PackedObject, pack, unpack
from lightning_mgpu.ray.ranks import RankAssignment
from lightning_mgpu.ray.trainer_state import RunState, weights_of
from lightning_mgpu.ray.worker import is_worker
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.ranks.launcher import names_of_parts, set_live_state_aside
from lightning_mgpu.strategies.ranks.predictions import RankPredictions, merge_predictions

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_mgpu.ray.on_ray import OnRay

log = logging.getLogger(__name__)


class RayLauncher(_Launcher):
    """Run the trainer on a group of workers while this process waits.

    Args:
        strategy: The strategy to launch for.
    """

    def __init__(self, strategy: "OnRay") -> None:
        self._strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: "Trainer | None" = None, **kw: Any
    ) -> Any:
        """Run ``function(*args, **kw)`` on every worker.

        Returns:
            Rank 0's result; for `Trainer.predict` the predictions of all ranks, as one process
            would have returned them.
        """
        assert trainer is not None
        if is_worker():
            raise LaunchError(
                "This process is itself a worker of a run on Ray, and a worker cannot start others."
                " Create the inner trainer with `devices=1` and `strategy='auto'`, or run it after"
                " the outer one."
            )
        self._strategy.check(trainer)
        connection.connect()
        entry = _WorkerEntry(self._strategy, trainer, function, args, kw)
        keeper = self._strategy.keeper() if trainer.state.fn == TrainerFn.FITTING else None
        if keeper is None:
            return self._bring_home(trainer, self._run(trainer, entry.pack()))
        with keeper:
            packed = replace(entry, save=keeper.save).pack()
            return self._bring_home(trainer, self._run_until_done(trainer, packed, keeper))

    def _run_until_done(
        self, trainer: "Trainer", packed: PackedObject, keeper: CheckpointKeeper
    ) -> list[list[PackedObject]]:
        """Start again from the latest checkpoint when workers are lost, as often as allowed."""
        for failures in itertools.count(1):
            try:
                return self._run(trainer, packed, keeper)
            except Exception as error:
                if not _is_loss(error) or failures > self._strategy.max_failures:
                    raise
                log.warning(
                    "%s (failure %d of %d). New workers resume from the end of the last"
                    " epoch, or start from the beginning if there is none.",
                    one_line(error, 200),
                    failures,
                    self._strategy.max_failures,
                )
        raise AssertionError

    def _run(
        self, trainer: "Trainer", packed: PackedObject, keeper: CheckpointKeeper | None = None
    ) -> list[list[PackedObject]]:
        state = ProcessState.capture(
            self._strategy.threads_per_worker, for_ranks=True, libraries=[hydra.take_state]
        )
        workers = self._take_workers(keeper)
        self._strategy.run_failed = False
        try:
            results = workers.run(packed, state, keeper.latest() if keeper is not None else None)
            if keeper is not None:
                keeper.finish(workers)
        except BaseException:
            worker_group.discard(workers)
            self._strategy.run_failed = True
            # What they have written so far is of use all the more.
            loggers.go_on(trainer.loggers, began=True)
            raise
        workers.rest(worker_group.idle_seconds())
        return results

    def _take_workers(self, keeper: CheckpointKeeper | None) -> worker_group.WorkerGroup:
        most, workers = self._strategy.num_workers, worker_group.take(self._strategy.group())
        try:
            if keeper is not None:
                keeper.check(workers)
        except ValueError:
            workers.rest(worker_group.idle_seconds())  # they are not at fault
            raise
        except BaseException:
            worker_group.discard(workers)
            raise
        if workers.size < most:
            log.warning(
                "Training on %d workers, of at most %d: the cluster has no more resources"
                " free at present. The batch of a step is that of %d workers.",
                *(workers.size, most, workers.size),
            )
        return workers

    def _bring_home(self, trainer: "Trainer", results: list[list[PackedObject]]) -> Any:
        # Weights are copied into the model at once: they need no memory in between.
        returned: RunState = unpack(results[0][0], copy=False)
        result = returned.restore(trainer)
        if trainer.state.fn == TrainerFn.PREDICTING:
            return merge_predictions([unpack(packs[1]) for packs in results])
        return result

    @override
    def kill(self, signum: int) -> None:
        """Forward a signal; the workers are stopped by the exception that follows."""
        if signum == signal.SIGTERM:
            worker_group.close()


@dataclass(frozen=True)
class _WorkerEntry:
    """A function of the trainer, in the form in which each worker runs it."""

    strategy: "OnRay"
    trainer: "Trainer"
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    save: Save | None = None

    def pack(self) -> PackedObject:
        """Pickle this entry, without what the workers make anew.

        Raises:
            UnpicklableError: Names the attribute at fault.
        """
        loggers.send(self.trainer.loggers)
        names = names_of_parts(self.strategy, self.trainer, self.function, self.args, self.kwargs)
        with ExitStack() as stack:
            set_live_state_aside(self.trainer, stack)
            return pack(self, names, weights_of(self.trainer).values())

    def __call__(self, place: RankAssignment, resume: str | None = None) -> list[PackedObject]:
        trainer = self.trainer
        attached = callbacks_of(trainer)
        callbacks, args = list(attached), self.args
        if self.save is not None:
            attached.append(Autosave(self.strategy.dump_checkpoint, self.save))
        if resume is not None:
            # `Trainer._fit_impl(..., ckpt_path, weights_only)`; the file is our own.
            args = (*args[:-2], resume, False)
        self.strategy.take_place(place)
        loggers.go_on(trainer.loggers, began=resume is not None)
        try:
            result = self.function(*args, **self.kwargs)
        except _TunerExitException:
            _end_search(trainer)
            result = None
        except BaseException:
            for logger in trainer.loggers:
                logger.finalize("failed")
            raise
        finally:
            trainer._signal_connector.teardown()
        predictions = None
        if trainer.state.fn == TrainerFn.PREDICTING:
            predictions, result = RankPredictions.of(trainer, result), None
        whole, returned = self.strategy.gather(trainer), None  # all ranks have a part in it
        if place.rank == 0:
            returned = RunState.of(trainer, result, callbacks, whole)
        return [
            pack(
                returned,
                {"result": result, "trainer.state": trainer.state},
                returned.large_tensors() if returned is not None else (),
            ),
            *([pack(predictions, {"predictions": predictions})] if predictions else []),
        ]


def _end_search(trainer: "Trainer") -> None:
    """End the Trainer's run as Lightning does where the `Tuner` stops after a search."""
    _call_teardown_hook(trainer)
    trainer._teardown()
    trainer.state.status, trainer.state.stage = TrainerStatus.FINISHED, None


def _is_loss(error: Exception) -> bool:
    """Return whether `error` reports a lost worker rather than a fault of the program."""
    if isinstance(error, WorkerDiedError):
        return True
    return is_collective_error(error) and not is_timeout_error(error)
