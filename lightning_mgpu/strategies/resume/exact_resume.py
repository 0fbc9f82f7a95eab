"""Checkpoints from which a run goes on as if it had never been interrupted."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from lightning_mgpu._compat import lightning_restart as restart
from lightning_mgpu._compat.lightning import (
    LightningModule,
    Trainer,
)
from lightning_mgpu._compat.lightning_attributes import assign
from lightning_mgpu._compat.lightning_loaders import wrap_train_loader
from lightning_mgpu._compat.lightning_loops import forget_restart
from lightning_mgpu._compat.lightning_messages import NOT_RESUMABLE
from lightning_mgpu._compat.lightning_results import (
    callback_metrics,
    go_on_logging,
    logged_so_far,
    metrics_to_reset,
    set_callback_metrics,
)
from lightning_mgpu.engine.random_state import RandomState
from lightning_mgpu.strategies.base.method_override import MethodOverride
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy
from lightning_mgpu.strategies.base.run_callback import RunCallback
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.resume import rank_state
from lightning_mgpu.strategies.resume.random_sources import accelerators, random_streams
from lightning_mgpu.strategies.resume.resumable_loader import Position, ResumableLoader
from lightning_mgpu.strategies.resume.resume_warnings import (
    of_rank,
    warn_of_callbacks,
    warn_of_generators,
    warn_of_half_a_batch,
    warn_of_hook,
    warn_of_loaders,
    warn_of_stop,
)

# Where a checkpoint is written decides what a Trainer that goes on from it has still to do:
#
#     epoch start | batch  batch  batch | validation | epoch end | epoch start ...
#     ^           ^^                   ^             ^           ^
#     hooks of    hooks of a batch's   the last      hooks of    hooks of the
#     the start   end                  batch's end   its end     epoch's end
#
# Lightning goes on behind the third, fourth and fifth, but leaves out what belongs to them:
# validation and the end of the epoch, or a scheduler's step (`_compat/lightning_restart.py`).
# Random states are put back just before the first thing that draws, since a Trainer calls hooks
# and asks for iterators before it goes on (`_settle`).


class ExactResume(RunCallback):
    """Save with each checkpoint all that a run needs to go on with the same bits.

    Beside what Lightning saves: random states of Python, NumPy, torch and the strategy's streams,
    the position within the epoch, metrics and logged values half-way, gradients of an accumulation
    that is under way; of each rank. The checkpoint stays one that Lightning loads without this
    callback.

    A run goes on exactly with the same program, strategy, number of ranks, machine and versions.
    What cannot be exact is told in a warning. Batches of the epoch that have been trained are
    fetched once more and left out, unless the loader keeps its place itself (`StatefulDataLoader`
    of torchdata).
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._loader: ResumableLoader | None = None
        self._undo: list[Callable[[], Any]] = []
        self._known: dict[str, Any] | None = None
        self._resumed = self._begins_validation = False
        self._silenced: warnings.catch_warnings[None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A worker starts anew: the Trainer, loaders and their processes are of this one.
        return vars(ExactResume())

    # --- Saving

    @override
    def state_dict(self) -> dict[str, Any]:
        trainer, loader = self._trainer, self._loader
        if trainer is None or loader is None:
            return {}
        # Whoever calls this may be one rank alone; `_gather_when_saving` asks the others.
        mine = self._known or self._state(trainer, loader)
        return {"world_size": trainer.world_size, "ranks": {str(trainer.global_rank): mine}}

    def _state(self, trainer: Trainer, loader: ResumableLoader) -> dict[str, Any]:
        model = trainer.lightning_module
        at_batch_end = restart.is_at_batch_end(trainer)
        at_epoch_end = restart.is_at_epoch_end(trainer)
        if at_batch_end:
            warn_of_hook(model)
        return {
            "now": RandomState(accelerators(trainer), loader.generators()).plain(),
            "start": loader.start.plain(),
            "first": loader.first.plain(),
            "ahead": None if loader.ahead is None else loader.ahead.plain(),
            "used": restart.batches_trained(trainer),
            "fetched": loader.fetched - restart.batches_begun(trainer),
            "within_batch": restart.is_within_batch(trainer),
            "at_batch_end": at_batch_end,
            "at_epoch_start": restart.is_at_epoch_start(trainer),
            "at_epoch_end": at_epoch_end,
            "is_last": restart.is_last_batch(trainer),
            "validates": at_batch_end and restart.is_validation_due(trainer),
            "steps": 0 if restart.is_accumulating(trainer) else 1,
            "accumulates": trainer.accumulate_grad_batches,
            "stops": trainer.should_stop,
            "streams": random_streams(trainer),
            "metrics": rank_state.metric_states(model, metrics_to_reset(trainer, at_epoch_end)),
            "logged": None if at_epoch_end else logged_so_far(trainer),
            "monitored": callback_metrics(trainer),
            "gradients": rank_state.gradients(trainer, model),
        }

    def _gather_when_saving(self, trainer: Trainer) -> None:
        """Have all ranks' states in checkpoints that all ranks write together."""
        strategy = trainer.strategy
        handled = sys.exc_info()[1]  # by whoever called `fit`

        def save_checkpoint(
            save: Callable[..., None], checkpoint: dict[str, Any], *args: Any, **kwargs: Any
        ) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            # After an error there may be nobody to answer.
            if state and sys.exc_info()[1] is handled:
                for ranks in rank_state.gathered(state["ranks"]):
                    state["ranks"].update(ranks)
            save(checkpoint, *args, **kwargs)

        self._undo.append(MethodOverride(strategy, "save_checkpoint", save_checkpoint).remove)

    # --- Going on

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if stage != "fit":
            return
        self._trainer = trainer
        # First of all, so that others find random states as they were. (A new list, since Lightning
        # iterates over the old one.)
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        assign(trainer, "callbacks", [self, *others])
        devices = accelerators(trainer)

        def wrap(loaders: Any, mode: str) -> ResumableLoader:
            loader = ResumableLoader(
                loaders, mode, devices, self._settle, lambda: self._known is None
            )
            self._loader = loader
            self._aim(trainer, loader)
            return loader

        self._undo.append(wrap_train_loader(trainer, wrap))
        self._gather_when_saving(trainer)
        self._start_behind_hooks(trainer)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._trainer is None:
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key) or {}
        known = of_rank(state, trainer)
        if known is None:
            return
        self._known, self._resumed = known, True
        warn_of_callbacks(trainer)
        if known["within_batch"]:
            warn_of_half_a_batch()
        if known["at_batch_end"] and (known["validates"] or known["is_last"]):
            restart.end_batch(checkpoint, known["validates"], known["steps"])
        elif known["at_epoch_start"]:
            restart.begin_epoch(checkpoint)

    def _aim(self, trainer: Trainer, loader: ResumableLoader) -> None:
        """Have the loader go on where the checkpoint was written, if there is one."""
        known = self._known
        if known is None:
            return
        warn_of_generators(trainer, loader)
        if known["is_last"] and not (known["at_epoch_start"] or known["at_epoch_end"]):
            loader.idle()
            return
        loader.wait()
        if not known["is_last"]:
            loader.position = Position(
                RandomState.of(known["start"]),
                RandomState.of(known["first"]),
                None if known["ahead"] is None else RandomState.of(known["ahead"]),
                known["used"],
                known["fetched"],
            )
            self._silence()
        warn_of_loaders(trainer, loader, known["used"])

    def _silence(self) -> None:
        """Have Lightning not warn that the loader does not keep its place, until `_settle`."""
        self._silenced = silenced = warnings.catch_warnings()
        silenced.__enter__()
        warnings.filterwarnings("ignore", NOT_RESUMABLE)

    def _be_loud(self) -> None:
        silenced, self._silenced = self._silenced, None
        if silenced is not None:
            silenced.__exit__(None, None, None)

    def _settle(self) -> None:
        """Put back everything, just before the first thing happens that came next."""
        known, self._known = self._known, None
        if known is None:
            return
        self._be_loud()
        trainer, loader = self._trainer, self._loader
        assert trainer is not None
        assert loader is not None
        model, strategy = trainer.lightning_module, trainer.strategy
        rank_state.restore_metrics(model, known["metrics"])
        rank_state.restore_gradients(model, known["gradients"])
        if not known["at_batch_end"]:  # where it is time that was up, or somebody's wish
            self._stop_if_stopped(trainer, known)
        if known["logged"] is not None:
            go_on_logging(trainer, known["logged"])
        if known["streams"] is not None and isinstance(strategy, MultiDeviceStrategy):
            strategy.random_streams().load_state_dict(known["streams"])
        RandomState.of(known["now"]).restore(loader.generators())

    def _start_behind_hooks(self, trainer: Trainer) -> None:
        """Have `_start` called after everybody's `on_train_start`: the strategy's is the last."""

        def on_train_start(own: Callable[[], None]) -> None:
            own()
            self._start(trainer)

        override = MethodOverride(trainer.strategy, "on_train_start", on_train_start)
        self._undo.append(override.remove)

    def _start(self, trainer: Trainer) -> None:
        known = self._known
        if known is None:
            return
        set_callback_metrics(trainer, known["monitored"])
        trainer.accumulate_grad_batches = known["accumulates"]  # a callback may have set it
        if known["at_epoch_end"]:
            self._stop_if_stopped(trainer, known)
            restart.step_plateau_schedulers(trainer)
        elif known["at_batch_end"] and (known["validates"] or known["is_last"]):
            self._settle()  # there is no hook before what follows
            self._begins_validation = known["validates"]
            restart.go_on_behind_batch(trainer, known["validates"])

    def _stop_if_stopped(self, trainer: Trainer, known: dict[str, Any]) -> None:
        if known["stops"] and not trainer.should_stop:
            trainer.should_stop = True
            warn_of_stop()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begins_validation:
            restart.begin_validation(trainer)
            self._begins_validation = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()
        if self._resumed:
            forget_restart(trainer.fit_loop)
            self._resumed = False

    @override
    def _end_run(self) -> None:
        self._be_loud()
        while self._undo:
            self._undo.pop()()

    def _release(self) -> None:
        self._end_run()
        self._trainer = self._loader = self._known = None
        self._resumed = self._begins_validation = False
