"""Record `self.log` calls on each replica, and log each name once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_mgpu.engine.batch import weighted_mean

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "max": torch.max,
    "min": torch.min,
}
# Among the arguments behind name and value.
_BATCH_SIZE_POSITION = 9
# A count that is equal for all shards by chance is soon another.
_CONSTANT_STEPS = 3
_SIGNATURE = inspect.signature(LightningModule.log)


@dataclass(frozen=True)
class _LogCall:
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: Mapping[str, Any]
    """Arguments by Lightning's names."""


class LogRecorder:
    """Replacement for `LightningModule.log` on one replica.

    A user's override of it is called when the values are logged, once, on the master.
    """

    def __init__(self) -> None:
        # The same name may be logged several times in a step.
        self.calls: dict[tuple[str, int], _LogCall] = {}

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Record a call; the arguments are those of `LightningModule.log`."""
        try:
            options = _SIGNATURE.bind_partial(None, name, value, *args, **kwargs).arguments
        except TypeError:  # an override with other arguments
            options = kwargs
        number = 0
        while (name, number) in self.calls:
            number += 1
        self.calls[name, number] = _LogCall(value, args, kwargs, options)


class BatchSizes:
    """Meaning of the `batch_size` that steps log: each shard's own, or the same constant always.

    A constant says nothing of the shards. It is known by having been the same on all of them for
    some steps, or by being the size of the whole batch.
    """

    def __init__(self) -> None:
        # By name: the value, what it stands for in shards, and for how many steps it has stayed.
        self._same: dict[str, tuple[Any, int, int]] = {}
        self._own: set[str] = set()

    def weigh(
        self, name: str, given: Sequence[Any], sizes: Sequence[int]
    ) -> tuple[list[float], int | None]:
        """Weights of the shards' values, and the batch size to log; `None` if none was given."""
        if all(n is None for n in given):
            return [float(size) for size in sizes], None
        own = [float(size if n is None else n) for n, size in zip(given, sizes, strict=True)]
        if name in self._own or any(n != given[0] for n in given):
            self._own.add(name)
            return own, round(sum(own))
        factor = 1 if given[0] == sum(sizes) else len(given)
        value, factor, steps = self._same.get(name, (given[0], factor, 0))
        if value != given[0]:
            self._own.add(name)
            return own, round(sum(own))
        self._same[name] = value, factor, steps + 1
        is_constant = factor == 1 or steps >= _CONSTANT_STEPS
        return [float(s) for s in sizes] if is_constant else own, round(value * factor)


def replay(
    recorders: Sequence[LogRecorder],
    sizes: Sequence[int],
    log: Callable[..., None],
    original: Callable[[Any], Any],
    batch_sizes: BatchSizes | None = None,
) -> None:
    """Log what the replicas have recorded, each name once.

    Means are weighted by `batch_size` where each shard gives its own, and else by shard size; sums,
    minima and maxima are what their `reduce_fx` says.

    Args:
        recorders: One per replica.
        sizes: Samples in each replica's shard.
        log: The master's `log`.
        original: The master's own of a replica's metric object.
        batch_sizes: What earlier steps gave.
    """
    batch_sizes = batch_sizes or BatchSizes()
    keys = dict.fromkeys(key for recorder in recorders for key in recorder.calls)
    for key in keys:
        having = [
            (recorder.calls[key], size)
            for recorder, size in zip(recorders, sizes, strict=True)
            if key in recorder.calls
        ]
        calls = [call for call, _ in having]
        shares = [size for _, size in having]
        given = [call.options.get("batch_size") for call in calls]
        weights, size = batch_sizes.weigh(key[0], given, shares)
        args, kwargs = calls[0].args, dict(calls[0].kwargs)
        if size is not None:
            args = args[:_BATCH_SIZE_POSITION]
            kwargs["batch_size"] = size
        how = _name(calls[0].options.get("reduce_fx", "mean"))
        value = _merge([call.value for call in calls], weights, how, original)
        log(key[0], value, *args, **kwargs)


def means_of(outputs: Sequence[Any], recorders: Sequence[LogRecorder]) -> list[list[float]]:
    """Means per replica: the numbers it returned, its loss first, and those it logged.

    Only what all replicas have, in the same order for each.
    """
    columns = [[_scalars(output) for output in outputs]]
    for key in recorders[0].calls:
        calls = [recorder.calls.get(key) for recorder in recorders]
        if all(
            c is not None and _name(c.options.get("reduce_fx", "mean")) == "mean" for c in calls
        ):
            columns.append([_scalars(call.value) for call in calls if call is not None])
    rows: list[list[float]] = [[] for _ in recorders]
    for column in columns:
        if len({len(values) for values in column}) == 1:
            for row, values in zip(rows, column, strict=True):
                row.extend(values)
    return rows


def _scalars(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        values = [value["loss"], *value.values()] if "loss" in value else list(value.values())
        return [number for entry in values for number in _scalars(entry)]
    if isinstance(value, Tensor):
        real = value.numel() == 1 and value.is_floating_point()
        return [float(value.detach())] if real else []
    return [value] if isinstance(value, float) else []


def _name(reduce_fx: Any) -> str:
    return reduce_fx.lower() if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")


def _merge(
    values: Sequence[Any], weights: Sequence[float], how: str, original: Callable[[Any], Any]
) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {
            key: _merge([value[key] for value in values], weights, how, original) for key in first
        }
    if not isinstance(first, (Tensor, int, float)):
        return original(first)
    if len(values) == 1:
        return first
    if any(isinstance(value, Tensor) for value in values) and not isinstance(first, Tensor):
        first = next(value for value in values if isinstance(value, Tensor))
    tensors = [_scalar(value, first) for value in values]
    if how in _REDUCTIONS:
        return _REDUCTIONS[how](torch.stack(tensors))
    mean = weighted_mean(tensors, weights if sum(weights) else [1.0] * len(weights))
    return mean if isinstance(first, Tensor) else float(mean)


def _scalar(value: Any, first: Any) -> Tensor:
    """A logged value as a tensor on the device and in the dtype used for merging."""
    if not isinstance(first, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    tensor = torch.as_tensor(value).detach().to(first.device)
    if tensor.numel() == 1:
        tensor = tensor.reshape(())
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
