"""Run the Trainer's entry points on every rank of the worker pool."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_mgpu._compat import hydra
from lightning_mgpu._compat.lightning import (
    SIGTERMException,
    TrainerFn,
    _Launcher,
    _TunerExitException,
)
from lightning_mgpu._compat.lightning_loops import progress_of, set_live_state_aside
from lightning_mgpu._compat.lightning_trainer import (
    restore_signal_handlers,
    signal_handlers_before,
)
from lightning_mgpu._compat.python import frame_above
from lightning_mgpu.launch.payload import Payload
from lightning_mgpu.launch.pool import default_pool
from lightning_mgpu.launch.rank import Rank
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.ranks.environment import PoolEnvironment
from lightning_mgpu.strategies.ranks.predictions import RankPredictions, merge_predictions
from lightning_mgpu.strategies.ranks.recovery import Recovery

if TYPE_CHECKING:
    import torch

    from lightning_mgpu._compat.lightning import DDPStrategy, Strategy, Trainer


class PoolLauncher(_Launcher):
    """Run a function of the trainer as rank 0 in this process and as other ranks in the pool.

    Since rank 0 works on the caller's own objects, nothing has to be brought back: weights,
    metrics, callbacks and loops are as a single-process run would leave them.

    Args:
        strategy: The strategy to launch for; its cluster environment is a `PoolEnvironment`.
        devices_of: Tells the devices of each rank.
    """

    def __init__(
        self, strategy: "DDPStrategy", devices_of: "Callable[[int], Sequence[torch.device]]"
    ) -> None:
        self._strategy, self._devices_of = strategy, devices_of

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: "Trainer | None" = None, **kw: Any
    ) -> Any:
        """Run ``function(*args, **kw)`` on every rank.

        Returns:
            Rank 0's result; for `Trainer.predict` the predictions of all ranks, as one process
            would have returned them.
        """

        def launch(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return self._launch(trainer, function, args, kwargs)

        recovery: Recovery | None = getattr(self._strategy, "recovery", None)
        is_alone = self._strategy.num_processes == 1
        if recovery is None or is_alone or trainer is None or not _fits(trainer):
            return launch(function, args, kw)
        return recovery.run(trainer, launch, function, args, kw)

    def _launch(
        self,
        trainer: "Trainer | None",
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kw: dict[str, Any],
    ) -> Any:
        entry = _RankEntry(self._strategy, trainer, function, args, kw)
        world_size = self._strategy.num_processes
        with entry.pickled() if world_size > 1 else nullcontext() as payload:
            results = default_pool().launch(
                entry,
                payload,
                world_size=world_size,
                timeout=getattr(self._strategy, "_timeout", None) or default_pg_timeout,
                hang_timeout=getattr(self._strategy, "hang_timeout_s", None),
                prepare=_announce_rank,
                normal_exit=(_TunerExitException,),
                locations=self._locations,
                libraries=[hydra.take_state],
            )
        if isinstance(results[0], RankPredictions):
            return merge_predictions(results)
        return results[0]

    def _locations(self, rank: int) -> dict[str, str]:
        """Map each device of rank 0 to the device of another rank."""
        pairs = zip(self._devices_of(0), self._devices_of(rank), strict=True)
        return {str(ours): str(theirs) for ours, theirs in pairs}

    @override
    def kill(self, signum: int) -> None:
        """Forward a signal; called from Lightning's own signal handler."""
        if signum == signal.SIGTERM:
            # The program's own handler, which Lightning would call last.
            model = self._strategy.lightning_module
            handlers = {} if model is None else signal_handlers_before(model.trainer)
            if callable(handler := handlers.get(signal.SIGTERM)):
                handler(signum, frame_above(0))
            # Lightning would go on to tell the other ranks by a collective, in the middle of
            # whatever collective this rank is in. Leave at once: the launch ends the workers.
            raise SIGTERMException
        default_pool().close()


@dataclass(frozen=True)
class _RankEntry:
    """A function of the trainer, in the form in which each rank runs it."""

    strategy: "DDPStrategy"
    trainer: "Trainer | None"
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, rank: Rank) -> Any:
        environment = self.strategy.cluster_environment
        assert isinstance(environment, PoolEnvironment)
        environment.rank = rank
        _announce_rank(rank)
        try:
            result = self.function(*self.args, **self.kwargs)
        finally:
            environment.rank = None
            if self.trainer is not None:
                # After a failure Lightning would do so when the launch is over, and put back the
                # handlers that it found within.
                restore_signal_handlers(self.trainer)
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return RankPredictions.of(self.trainer, result)
        # Metrics are reduced over the ranks already.
        return result if rank.rank == 0 else None

    def progress(self) -> dict[str, Any]:
        """How far this rank is, for the message about a hang; called from another thread."""
        return {} if self.trainer is None else progress_of(self.trainer)

    @contextmanager
    def pickled(self) -> Iterator[Payload]:
        """Pickle this entry, without what the workers make anew.

        Raises:
            UnpicklableError: Names the attribute at fault.
        """
        with ExitStack() as stack:
            if self.trainer is not None:
                set_live_state_aside(self.trainer, stack)
            names = names_of_parts(
                self.strategy, self.trainer, self.function, self.args, self.kwargs
            )
            payload = Payload(self, names, self._rewritten())
        with payload:
            yield payload

    def _rewritten(self) -> "list[torch.Tensor]":
        """Tensors that DDP broadcasts from rank 0 before anything else, so they need not be sent.

        Evaluation does not wrap the model in DDP, and reads the weights only.
        """
        if self.trainer is None or not _fits(self.trainer):
            return []
        module = self.trainer.lightning_module
        return [*module.parameters(), *module.buffers()]


def names_of_parts(
    strategy: "Strategy",
    trainer: "Trainer | None",
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Name the parts of a launch as users know them, for error messages."""
    if trainer is None:
        return {"function": function, "arguments": (args, kwargs)}
    names: dict[str, Any] = {"model": trainer.lightning_module}
    names |= {
        f"trainer.callbacks[{i}]": callback for i, callback in enumerate(callbacks_of(trainer))
    }
    names |= {f"trainer.loggers[{i}]": logger for i, logger in enumerate(trainer.loggers)}
    names |= {"trainer.strategy": strategy}
    names |= {type(argument).__name__: argument for argument in args}
    return {**names, "trainer": trainer}


def _fits(trainer: "Trainer") -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _announce_rank(rank: Rank) -> None:
    """Set `rank_zero_only.rank` before any user's object is unpickled."""
    rank_zero_only.rank = rank.rank  # type: ignore[attr-defined]
