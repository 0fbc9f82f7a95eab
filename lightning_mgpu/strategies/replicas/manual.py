"""Manual optimisation on replicas: common calls are made once, when all replicas ask.

Two replicas in one step, from top to bottom::

    worker of slot 0          worker of slot 1          the thread that called `Workers.run`
    ----------------          ----------------          ------------------------------------
    loss of shard 0           loss of shard 1           waits for tasks and calls
    manual_backward --------- manual_backward --------> all have come: the master is made as it is
      waits                     waits                   outside of steps, for the joint loss's
      runs its backward <------ runs its backward <---- backward, which lends the threads its work
      goes on <---------------- goes on <-------------- one gradient a parameter; back in the step
    optimizer.step ---------- optimizer.step ---------> all have come: one step of the optimizer,
      waits                     waits                   whose closure, if there is one, runs on
      goes on <---------------- goes on <-------------- both workers as their backward has

A replica that calls something else, or ends, while the others wait is a `LockstepError`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch import weighted_mean
from lightning_mgpu.engine.worker_thread import on_caller

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class ManualOptimization:
    """State of one step of manual optimisation on all replicas.

    Args:
        model: The master.
        sizes: Samples in each replica's shard.
        joint_loss: The loss of the batch, from that of each replica.
        run_closures: Runs one function on each replica, from within a call that all have made, and
            returns their results.
    """

    def __init__(
        self,
        model: "LightningModule",
        sizes: Sequence[int],
        joint_loss: Callable[[list[Tensor]], Tensor],
        run_closures: Callable[[list[Callable[[], Any]]], list[Any]],
    ) -> None:
        self._model = model
        self._sizes = sizes
        self._joint_loss = joint_loss
        self._run_closures = run_closures
        self._losses: dict[int, Tensor] = {}
        self._closures: dict[int, Callable[[], Any]] = {}
        self._values: dict[int, Any] = {}

    def overrides(self, slot: int) -> dict[str, Any]:
        """Methods of replica `slot` that work in lockstep with the other replicas."""
        model = self._model
        strategy = model.trainer.strategy

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._losses[slot] = loss
            on_caller("manual_backward", lambda: backward(*args, **kwargs))

        def backward(*args: Any, **kwargs: Any) -> None:
            losses = [loss for _, loss in sorted(self._losses.items())]
            self._losses.clear()
            model.manual_backward(self._joint_loss(losses), *args, **kwargs)

        def optimizers(use_pl_optimizer: bool = True) -> Any:
            found = strategy._lightning_optimizers if use_pl_optimizer else strategy.optimizers
            stand_ins = [LockstepOptimizer(self, slot, optimizer) for optimizer in found]
            return stand_ins[0] if len(stand_ins) == 1 else stand_ins

        def lr_schedulers() -> Any:
            found = type(model).lr_schedulers(model)  # the instance's own may be this one
            if isinstance(found, list):
                return [LockstepScheduler(self, slot, scheduler) for scheduler in found]
            return None if found is None else LockstepScheduler(self, slot, found)

        def toggle_optimizer(optimizer: Any) -> None:
            on_caller("toggle_optimizer", lambda: model.toggle_optimizer(_real(optimizer)))

        def untoggle_optimizer(optimizer: Any) -> None:
            on_caller("untoggle_optimizer", lambda: model.untoggle_optimizer(_real(optimizer)))

        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            on_caller(
                "clip_gradients", lambda: model.clip_gradients(_real(optimizer), *args, **kwargs)
            )

        return {
            "manual_backward": manual_backward,
            "optimizers": optimizers,
            "lr_schedulers": lr_schedulers,
            "toggle_optimizer": toggle_optimizer,
            "untoggle_optimizer": untoggle_optimizer,
            "clip_gradients": clip_gradients,
        }

    def step(self, slot: int, optimizer: Any, closure: Any, kwargs: dict[str, Any]) -> Any:
        """Step an optimizer once, with the replicas' closures if there are any."""
        if closure is None:
            return on_caller("optimizer.step", lambda: optimizer.step(**kwargs))
        self._closures[slot] = closure
        return on_caller(
            "optimizer.step", lambda: optimizer.step(closure=self._closure(), **kwargs)
        )

    def schedule(self, slot: int, scheduler: Any, value: Any) -> None:
        """Step a scheduler once, with the mean of the replicas' metrics if there are any."""
        self._values[slot] = value
        on_caller("lr_scheduler.step", lambda: scheduler.step(*self._mean_value()))

    def _mean_value(self) -> tuple[Any, ...]:
        values = [torch.as_tensor(v) for _, v in sorted(self._values.items()) if v is not None]
        self._values.clear()
        return (weighted_mean(values, self._sizes),) if values else ()

    def _closure(self) -> Callable[[], Any]:
        closures = [closure for _, closure in sorted(self._closures.items())]
        self._closures.clear()
        return lambda: self._run_closures(closures)[0]


class LockstepOptimizer:
    """Replica's view of one of the Trainer's optimizers."""

    def __init__(self, manual: ManualOptimization, slot: int, optimizer: Any) -> None:
        self._manual = manual
        self._slot = slot
        self._real = optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step once, when every replica has asked for it; `closure` runs on all of them."""
        return self._manual.step(self._slot, self._real, closure, kwargs)

    @property
    def optimizer(self) -> "LockstepOptimizer":
        """Torch's own optimizer, in lockstep."""
        return LockstepOptimizer(self._manual, self._slot, self._real.optimizer)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reset the gradients once, when every replica has asked for it."""
        on_caller("optimizer.zero_grad", lambda: self._real.zero_grad(*args, **kwargs))

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Do as `LightningOptimizer.toggle_model`; there is nothing to synchronise."""
        model = self._manual._model
        on_caller("toggle_optimizer", lambda: model.toggle_optimizer(self._real))
        yield
        on_caller("untoggle_optimizer", lambda: model.untoggle_optimizer(self._real))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own on replica 0; on the others copies, so that changes count once."""
        groups: list[dict[str, Any]] = self._real.param_groups
        return groups if self._slot == 0 else [dict(group) for group in groups]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if not inspect.ismethod(found):
            return found
        # Whatever an optimizer has besides (the passes of SAM, `swap`), it does for all at once.
        return lambda *args, **kwargs: on_caller(
            f"optimizer.{name}", lambda: found(*args, **kwargs)
        )


class LockstepScheduler:
    """Replica's view of one of the Trainer's learning rate schedulers."""

    def __init__(self, manual: ManualOptimization, slot: int, scheduler: Any) -> None:
        self._manual = manual
        self._slot = slot
        self._real = scheduler

    def step(self, metrics: Any = None) -> None:
        """Step once, when every replica has asked for it, with the mean of their `metrics`."""
        self._manual.schedule(self._slot, self._real, metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _real(optimizer: Any) -> Any:
    return optimizer._real if isinstance(optimizer, LockstepOptimizer) else optimizer
