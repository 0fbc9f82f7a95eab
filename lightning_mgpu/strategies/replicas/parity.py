"""Compute the first batch of each kind of step whole and in shards, and compare."""

import logging
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_mgpu.engine.batch import weighted_mean
from lightning_mgpu.engine.batch.unevenness import differing
from lightning_mgpu.engine.compare import (
    SINGLE_WITHIN_DOUBLE,
    Difference,
    ParityError,
    Precision,
    compare,
    signature,
)
from lightning_mgpu.engine.data_parallel.copying.isolation import UnsafeError
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.device import autocast_dtype, is_accelerator
from lightning_mgpu.engine.workers import Workers
from lightning_mgpu.strategies.replicas.dry_run import Conditions, Result, dry_run
from lightning_mgpu.strategies.replicas.log_merging import replay
from lightning_mgpu.strategies.replicas.metrics import ReplicaMetrics, is_metric, seen
from lightning_mgpu.strategies.replicas.parity_advice import Findings, loss_in, message, nan_message
from lightning_mgpu.strategies.replicas.replica_step import Step
from lightning_mgpu.strategies.replicas.sharding import Sharding

log = logging.getLogger(__name__)

Mode = Literal["warn", "error", "off"]

# A run whose batches never have the same structure twice is not checked for ever.
_MAX_STRUCTURES = 8


class ParityCheck:
    """Compare a step's result for a whole batch with that for the shards.

    Both are computed without lasting effects, on the first batch of each kind of step, where the
    structure of the batches changes, and where lists are the first to differ in size between
    shards, which a step may pad to the largest.

    Args:
        mode: What happens where they differ: ``"warn"``, ``"error"``, or ``"off"`` (no check).
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._model: weakref.ref[LightningModule] | None = None
        self._checked: dict[Hashable, frozenset[str]] = {}
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_checked": {}}

    def before(
        self, step: Step, batch: Any, sharding: Sharding, replicas: Replicas, workers: Workers
    ) -> None:
        """Check a step that is about to run, unless one like it has been checked.

        Raises:
            ParityError: In the mode ``"error"``, if there are differences.
        """
        if self._mode == "off" or len(step.shards) < 2:
            return
        model = replicas.master
        assert isinstance(model, LightningModule)
        if step.name == "training_step" and not model.automatic_optimization:
            return  # its optimizers cannot step for a trial
        if self._model is None or self._model() is not model:
            self._model, self._checked, self._told = weakref.ref(model), {}, set()
        key = (step.name, step.dataloader_idx, signature(batch))
        uneven = differing([shard.batch for shard in step.shards])
        if key in self._checked:
            if uneven <= self._checked[key]:
                return
            uneven |= self._checked[key]
        elif self._count(key[:2]) >= _MAX_STRUCTURES:
            return
        found = _compared(step, batch, sharding, replicas, workers)
        if found is not None and self._mode == "error":
            raise ParityError(found.text)
        self._checked[key] = uneven
        if found is not None and step.name not in self._told:
            self._told |= {step.name, _nan(step)} if found.tells_nan else {step.name}
            log.warning(found.text)

    def after(self, step: Step, losses: Sequence[Tensor | None], loss: Tensor | None) -> None:
        """Warn once of a loss that is NaN on some replicas only."""
        if self._mode == "off" or loss is None or is_accelerator(loss.device):
            return  # on other devices, to look at it would wait for it
        if bool(loss.isnan()) and _nan(step) not in self._told:
            text = nan_message(step, {"loss": losses})
            if text is not None:
                self._told.add(_nan(step))
                log.warning("`%s`: %s", step.name, text)

    def _count(self, kind: Any) -> int:
        return sum(key[:2] == kind for key in self._checked)  # type: ignore[index]


@dataclass(frozen=True)
class _Told:
    text: str
    tells_nan: bool


def _nan(step: Step) -> str:
    return f"{step.name}: NaN"


def _compared(
    step: Step, batch: Any, sharding: Sharding, replicas: Replicas, workers: Workers
) -> _Told | None:
    """Describe the differences; `None` if there are none, or if they cannot be known."""
    trial = sharding.trial()
    try:
        comparison = _StepComparison(step, batch, trial, replicas)
        try:
            (found,) = workers.run([comparison.run])
        except torch.OutOfMemoryError:
            # Any device has memory for the samples of one shard.
            batch = step.shards[0].batch
            comparison = _StepComparison(step.of(trial.scatter(batch)), batch, trial, replicas)
            (found,) = workers.run([comparison.run])
        if comparison.is_proven:
            sharding.confirm(trial)
        return None if found is None else _Told(message(found), found.nan is not None)
    except Exception as error:  # whatever is wrong with the step itself, its own run will tell
        log.info("`%s` was not checked: %s", step.name, error)
        return None


class _StepComparison:
    """One step on one batch, whole and in shards, on the first device.

    Attributes:
        is_proven: Whether both have given the same.
    """

    def __init__(self, step: Step, batch: Any, sharding: Sharding, replicas: Replicas) -> None:
        self._step, self._batch, self._sharding = step, batch, sharding
        self.is_proven = False
        self._master = replicas.master
        self._device = replicas.devices[0]
        self._make = replicas.sandboxes()

    def run(self) -> Findings | None:
        """Find differences; `None` if there are none, or if random draws hide them."""
        found = self._tried()
        if found is None:
            return None
        how, whole, parts = found
        differences = self._differences(whole, parts, self._precision())
        if not differences or self._is_rounding(how, whole, parts):
            self.is_proven = True
            return None
        doubts = self._sharding.doubts
        return Findings(self._step, self._batch, self._master, whole, parts, differences, doubts)

    def _tried(self) -> tuple[Conditions, Result, list[Result]] | None:
        """Runs under the first conditions in which the step succeeds."""
        try:
            return self._comparable(Conditions())
        except (UnsafeError, torch.OutOfMemoryError):
            raise
        except Exception:
            if self._step.name != "training_step":
                raise
            return self._comparable(Conditions(grad=True))

    def _comparable(self, how: Conditions) -> tuple[Conditions, Result, list[Result]] | None:
        for evaluation in (False, True):
            tried = replace(how, evaluation=evaluation)
            whole = self._whole(tried)
            if whole.drew:
                continue
            parts = self._shards(tried)
            if any(part.drew for part in parts):
                continue
            if evaluation and self._has_no_loss(whole):
                # A detector, say. All that is left are the same draws for all.
                return how, self._whole(how), self._shards(how)
            return tried, whole, parts
        return None

    def _has_no_loss(self, whole: Result) -> bool:
        if self._step.name != "training_step":
            return False
        loss = loss_in(whole.output)
        return loss is None or not bool(loss.any())

    def _whole(self, how: Conditions) -> Result:
        return dry_run(self._make, self._step, self._batch, how)

    def _shards(self, how: Conditions) -> list[Result]:
        return [dry_run(self._make, self._step, s.batch, how) for s in self._step.shards]

    def _is_rounding(self, how: Conditions, whole: Result, parts: list[Result]) -> bool:
        """Return whether the differences disappear in double precision.

        In a model of double precision they are if single precision within it explains them.
        """
        if self._precision() is torch.float64:
            return not self._differences(whole, parts, SINGLE_WITHIN_DOUBLE)
        how = replace(how, double=True)
        try:
            return not self._differences(self._whole(how), self._shards(how), torch.float32)
        except Exception:
            return False

    def _precision(self) -> torch.dtype | None:
        """The least precise dtype that the step computes in."""
        dtypes = {p.dtype for p in self._master.parameters() if p.is_floating_point()}
        cast_to = autocast_dtype(self._device)
        if cast_to is not None:
            dtypes.add(cast_to)
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def _differences(
        self, whole: Result, parts: list[Result], precision: Precision | None
    ) -> list[Difference]:
        sizes = self._step.sizes
        total = [sum(sizes)]
        pairs = [
            ("logged", self._logged([whole], total), self._logged(parts, sizes)),
            *self._of_metrics(whole, parts),
        ]
        outputs = [part.output for part in parts]
        output, gather = whole.output, self._sharding.gather
        if self._step.name == "training_step":
            losses = [loss_in(output) for output in outputs]
            pairs.insert(0, ("loss", loss_in(output), _mean(losses, sizes)))
            output, outputs = _without_loss(output), list(map(_without_loss, outputs))
        if self._sharding.gather_fn is not None and output is not None:
            output = gather([output], total)
        pairs.append(("output", output, gather(outputs, sizes)))
        return [d for path, a, b in pairs for d in compare(a, b, path, precision)]

    def _logged(self, results: Sequence[Result], sizes: Sequence[int]) -> dict[str, Any]:
        logged: dict[str, Any] = {}

        def note(name: str, value: Any, *_: Any, **__: Any) -> None:
            if not is_metric(value):
                logged[name if name not in logged else f"{name}, again"] = value

        metrics = ReplicaMetrics(results[0].masters, [result.units for result in results])
        replay([result.logs for result in results], sizes, note, metrics.original)
        return logged

    def _of_metrics(self, whole: Result, parts: list[Result]) -> list[tuple[str, Any, Any]]:
        names = {id(module): name for name, module in self._master.named_modules()}
        sizes = self._step.sizes
        try:
            values = seen(whole.masters, [whole.units], [sum(sizes)])
            others = seen(whole.masters, [part.units for part in parts], sizes)
        except Exception:  # one that cannot be computed of so few samples, for instance
            return []
        pairs = zip(whole.masters, values, others, strict=True)
        return [(names.get(id(metric), type(metric).__name__), a, b) for metric, a, b in pairs]


def _mean(losses: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The loss of the batch as `joint_loss` makes it."""
    having = [(loss, size) for loss, size in zip(losses, sizes, strict=True) if loss is not None]
    if not having:
        return None
    if any(loss.numel() != 1 for loss, _ in having):
        raise ValueError("its loss is no scalar")
    return weighted_mean([loss.detach() for loss, _ in having], [size for _, size in having])


def _without_loss(output: Any) -> Any:
    if not isinstance(output, Mapping):
        return None
    return {key: value for key, value in output.items() if key != "loss"}
