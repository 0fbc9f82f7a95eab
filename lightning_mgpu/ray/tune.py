"""Callbacks and resources for Ray Tune trials that train on several workers.

Within a trial, `TuneReportCallback` reports what the workers log, and `get_tune_resources` says
what a trial with a `RayStrategy` takes.
"""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from ray import tune
from ray.tune import Checkpoint, PlacementGroupFactory

from lightning_mgpu.ray.worker import call_on_driver, is_worker

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["TuneReportCallback", "TuneReportCheckpointCallback", "get_tune_resources"]

# The hooks of a callback that have metrics to report.
_MOMENTS = (
    *("train_start", "train_batch_end", "train_epoch_end", "train_end"),
    *("validation_batch_end", "validation_epoch_end", "validation_end"),
    *("test_batch_end", "test_epoch_end", "test_end", "fit_end"),
)


def get_tune_resources(
    num_workers: int = 1,
    num_cpus_per_worker: float = 1,
    use_gpu: bool = False,
    resources_per_worker: Mapping[str, float] | None = None,
) -> PlacementGroupFactory:
    """Resources for `tune.with_resources` or `tune.run(resources_per_trial=...)`.

    Args:
        num_workers: As of the trial's `RayStrategy`.
        num_cpus_per_worker: CPU cores of each worker; a fraction will do.
        use_gpu: Whether each worker has a GPU.
        resources_per_worker: Further resources of each worker, by name.

    Returns:
        A bundle for each worker, and an empty one for the trial's own process, which only waits.
    """
    bundle = {
        "CPU": float(num_cpus_per_worker),
        "GPU": float(use_gpu),
        **(resources_per_worker or {}),
    }
    bundle = {name: amount for name, amount in bundle.items() if amount}
    return PlacementGroupFactory([{}, *[bundle] * num_workers], strategy="PACK")


class TuneReportCallback(Callback):
    """Report logged metrics to the trial in which the Trainer runs.

    Args:
        metrics: Which of `trainer.callback_metrics`: a name, several, or a mapping from Tune's
            names to Lightning's; `None` for all.
        on: When to report: one or several of Lightning's hooks, without their ``on_``.

    Raises:
        ValueError: `on` is not a moment at which there is something to report.
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        on: str | Sequence[str] = "validation_end",
    ) -> None:
        moments = [on] if isinstance(on, str) else list(on)
        self._moments = {moment.removeprefix("on_") for moment in moments}
        if unknown := self._moments - set(_MOMENTS):
            raise ValueError(
                f"`{type(self).__name__}(on={on!r})`: {sorted(unknown)[0]!r} is not one of"
                f" {', '.join(_MOMENTS)}."
            )
        self._metrics = [metrics] if isinstance(metrics, str) else metrics

    def _arrive(self, moment: str, trainer: "Trainer") -> None:
        if moment in self._moments and not trainer.sanity_checking:
            self._report(trainer, self._values(trainer))

    def _report(self, trainer: "Trainer", values: dict[str, float]) -> None:
        if trainer.is_global_zero:
            _in_the_trial(_report, values)

    def _values(self, trainer: "Trainer") -> dict[str, float]:
        logged = trainer.callback_metrics
        if self._metrics is None:
            return {name: value.item() for name, value in logged.items()}
        names = self._metrics
        if not isinstance(names, Mapping):
            names = {name: name for name in names}
        missing = sorted(set(names.values()) - set(logged))
        if missing:
            raise ValueError(
                f"`{type(self).__name__}(metrics={self._metrics!r})`: {missing[0]!r} has not been"
                f" logged; there is {', '.join(sorted(logged)) or 'nothing'}."
            )
        return {ours: logged[theirs].item() for ours, theirs in names.items()}


class TuneReportCheckpointCallback(TuneReportCallback):
    """Report metrics along with a checkpoint of the Trainer, of which Tune keeps the best.

    Args:
        metrics: As `TuneReportCallback`.
        filename: Name of the checkpoint's file within Tune's directory.
        on: As `TuneReportCallback`.
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        filename: str = "checkpoint",
        on: str | Sequence[str] = "validation_end",
    ) -> None:
        super().__init__(metrics, on)
        self._filename = filename

    def _report(self, trainer: "Trainer", values: dict[str, float]) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            stream = io.BytesIO()
            torch.save(checkpoint, stream)
            # The trial may run on another machine.
            _in_the_trial(_report_checkpoint, values, self._filename, stream.getvalue())


def _at(moment: str) -> Callable[..., None]:
    def hook(self: TuneReportCallback, trainer: "Trainer", *_: Any, **__: Any) -> None:
        self._arrive(moment, trainer)

    return hook


for _moment in _MOMENTS:
    setattr(TuneReportCallback, f"on_{_moment}", _at(_moment))


def _in_the_trial(function: Callable[..., None], *args: Any) -> None:
    """Call a function in the trial's process: on the driver of these workers, or here."""
    if is_worker():
        call_on_driver(function, *args)
    else:
        function(*args)


def _report(values: dict[str, float]) -> None:
    tune.report(values)


def _report_checkpoint(values: dict[str, float], filename: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / filename).write_bytes(data)
        tune.report(values, checkpoint=Checkpoint.from_directory(directory))
