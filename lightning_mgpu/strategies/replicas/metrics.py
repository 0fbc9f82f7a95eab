"""torchmetrics on replicas: merge each step's states into the master's metrics.

Each replica updates a metric of its own, empty at the start of a step. A metric whose states are
sums, maxima, minima or lists takes them over. Any other, and any collection or wrapper, is updated
once by the master, with the whole batch put together from what the replicas called it with.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from lightning_mgpu._compat.torchmetrics import note_updates, reductions_of
from lightning_mgpu.engine import batch

_MERGEABLE = (dim_zero_sum, dim_zero_max, dim_zero_min, dim_zero_cat)


def is_metric(value: Any) -> bool:
    """Return whether `value` is a metric or a collection of metrics."""
    return isinstance(value, (Metric, MetricCollection))


def replica_of(metric: Any) -> Any:
    """A metric for one replica, with the same settings and no state."""
    copied = copy.deepcopy(metric)
    copied.reset()
    _Guard(copied, records=not _can_merge(metric))
    return copied


class ReplicaMetrics:
    """The metrics of a step.

    Args:
        masters: The master's metrics.
        replicas: For each replica that takes part, its own of them.
    """

    def __init__(self, masters: Sequence[Any], replicas: Sequence[Sequence[Any]]) -> None:
        self._masters = masters
        self._replicas = replicas
        self._originals = {
            id(part): original
            for metrics in replicas
            for master, metric in zip(masters, metrics, strict=True)
            for original, part in zip(master.modules(), metric.modules(), strict=False)
        }

    def original(self, metric: Any) -> Any:
        """Master's metric for a replica's metric, or for a member of its collection."""
        return self._originals.get(id(metric), metric)

    def begin(self) -> None:
        """Empty the replicas' metrics."""
        for metrics in self._replicas:
            for metric in metrics:
                _guard(metric).begin()

    @torch.no_grad()
    def merge(self, sizes: Sequence[int]) -> None:
        """Merge the states of the replicas' metrics into the master's."""
        for index, master in enumerate(self._masters):
            metrics = [metrics[index] for metrics in self._replicas]
            if _guard(metrics[0]).records:
                _update(master, metrics, sizes)
            else:
                _merge(master, [m for m in metrics if m.update_called])


def seen(masters: Sequence[Any], replicas: Sequence[Sequence[Any]], sizes: Sequence[int]) -> Any:
    """Metrics' values after a step, for comparison; the masters stay unchanged.

    Args:
        masters: The master's metrics.
        replicas: For each replica, its own of them after a step.
        sizes: Samples in each replica's shard.

    Returns:
        For each metric its value, or what it would be updated with.
    """
    return [
        _seen_by(master, [metrics[index] for metrics in replicas], sizes)
        for index, master in enumerate(masters)
    ]


@torch.no_grad()
def _seen_by(master: Any, metrics: Sequence[Any], sizes: Sequence[int]) -> Any:
    if _guard(metrics[0]).records:
        return list(_joined_calls(metrics, sizes, torch.device("cpu")))
    updated = [metric for metric in metrics if metric.update_called]
    if not updated:
        return None
    fresh = copy.deepcopy(master)
    fresh.reset()
    _merge(fresh, updated)
    return fresh.compute()


def _can_merge(metric: Any) -> bool:
    return (
        isinstance(metric, Metric)
        and not any(metric.children())
        and bool(reductions_of(metric))
        and all(reduce in _MERGEABLE for reduce in reductions_of(metric).values())
        and not metric.full_state_update
    )


class _Guard:
    """Wrapper around the methods of a replica's metric.

    Args:
        metric: The replica's own.
        records: Whether to keep what it is called with, for the master to be called with.
    """

    def __init__(self, metric: Any, records: bool) -> None:
        self.records = records
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._metric = metric
        self._inside = False
        vars(metric)["_mgpu_guard"] = self
        for name in ("update", "forward"):
            vars(metric)[name] = self._noting(getattr(metric, name))
        for name in ("compute", "reset"):
            vars(metric)[name] = self._refusing(name, getattr(metric, name))

    def begin(self) -> None:
        """Empty the metric for a new step."""
        self.calls.clear()
        if any(isinstance(m, Metric) and m.update_called for m in self._metric.modules()):
            with self._within():
                self._metric.reset()

    @contextmanager
    def _within(self) -> Iterator[None]:
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.records and not self._inside:  # `forward` calls `update`
                self.calls.append(batch.map_leaves(_detached, (args, kwargs)))
            with self._within():
                return function(*args, **kwargs)

        return call

    def _refusing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                raise RuntimeError(
                    f"`{type(self._metric).__name__}.{name}()` in a step, where each replica"
                    " has its shard only. Log the metric object, or call it in a hook, such"
                    " as `on_train_epoch_end`."
                )
            return function(*args, **kwargs)

        return call


def _guard(metric: Any) -> _Guard:
    guard: _Guard = vars(metric)["_mgpu_guard"]
    return guard


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _merge(master: Metric, metrics: Sequence[Metric]) -> None:
    """Add the states of replicas to the master's, in the order of their shards."""
    if not metrics:
        return
    for name, reduce in reductions_of(master).items():
        states = [getattr(master, name), *(getattr(metric, name) for metric in metrics)]
        setattr(master, name, _reduced(states, reduce, master.device))
    # As many updates as the whole batch would have been.
    note_updates(master, max(metric.update_count for metric in metrics))


def _reduced(states: Sequence[Any], reduce: Any, device: torch.device) -> Any:
    if isinstance(states[0], list):
        entries = [entry for state in states for entry in state]
        return [entry.to(device) for entry in entries]
    moved = [state.to(device) for state in states]
    if reduce is dim_zero_cat:
        return torch.cat([state.reshape(-1) if state.dim() == 0 else state for state in moved])
    return reduce(torch.stack(moved))


def _update(master: Any, metrics: Sequence[Any], sizes: Sequence[int]) -> None:
    """Update the master's metric with the whole batch, call by call."""
    device = next((m.device for m in master.modules() if isinstance(m, Metric)), None)
    for args, kwargs in _joined_calls(metrics, sizes, device or torch.device("cpu")):
        master.update(*args, **kwargs)


def _joined_calls(
    metrics: Sequence[Any], sizes: Sequence[int], device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the replicas' calls of a metric, joined for the whole batch."""
    calls = [_guard(metric).calls for metric in metrics]
    for number in range(max(map(len, calls))):
        made = [(c[number], size) for c, size in zip(calls, sizes, strict=True) if number < len(c)]
        weights = [size for _, size in made]
        # One by one: two arguments are not an entry for each of two samples.
        columns = zip(*(args for (args, _), _ in made), strict=True)
        args = tuple(batch.join(column, weights, device) for column in columns)
        named = [kwargs for (_, kwargs), _ in made]
        yield args, {key: batch.join([k[key] for k in named], weights, device) for key in named[0]}
