"""torchmetrics objects under replicas: each step's states come back to the master's metric.

Each replica updates a metric of its own, empty at the start of a step. A metric whose states are
sums, maxima, minima or lists takes them over. Any other, and any collection or wrapper, is updated
once by the master, with the whole batch put together from what the replicas called it with.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from lightning_mgpu.engine import batch

__all__: list[str] = []

_MERGEABLE = (dim_zero_sum, dim_zero_max, dim_zero_min, dim_zero_cat)


def is_metric(value: Any) -> bool:
    """Whether it is a metric or a collection of them."""
    return isinstance(value, (Metric, MetricCollection))


def replica_of(metric: Any) -> Any:
    """A metric for one replica, with the same settings and no state."""
    copied = copy.deepcopy(metric)
    copied.reset()
    if not _can_merge(metric):
        _Recorder(copied)
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
        """The master's own of a replica's metric, or of a member of its collection."""
        return self._originals.get(id(metric), metric)

    def begin(self) -> None:
        """Empty the replicas' metrics."""
        for metrics in self._replicas:
            for metric in metrics:
                if _has_state(metric):
                    metric.reset()
                recorder = _recorder(metric)
                if recorder is not None:
                    recorder.calls.clear()

    @torch.no_grad()
    def merge(self, sizes: Sequence[int]) -> None:
        """Bring what the replicas' metrics have seen to the master's."""
        for index, master in enumerate(self._masters):
            metrics = [metrics[index] for metrics in self._replicas]
            if _recorder(metrics[0]) is None:
                _merge(master, [m for m in metrics if m._update_count])
            else:
                _update(master, metrics, sizes)


def _can_merge(metric: Any) -> bool:
    return (
        isinstance(metric, Metric)
        and not any(metric.children())
        and bool(metric._reductions)
        and all(reduce in _MERGEABLE for reduce in metric._reductions.values())
        and not metric.full_state_update
    )


def _has_state(metric: Any) -> bool:
    return any(isinstance(m, Metric) and m._update_count for m in metric.modules())


class _Recorder:
    """Notes what a metric is called with; stands before its `update` and `forward`."""

    def __init__(self, metric: nn.Module) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._inside = False
        self._metric = metric
        vars(metric)["_mgpu_recorder"] = self
        for name in ("update", "forward"):
            vars(metric)[name] = self._noting(getattr(metric, name))

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # `forward` calls `update`
                return function(*args, **kwargs)
            self.calls.append(batch.map_leaves(_detached, (args, kwargs)))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call


def _recorder(metric: Any) -> _Recorder | None:
    recorder: _Recorder | None = vars(metric).get("_mgpu_recorder")
    return recorder


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _merge(master: Metric, metrics: Sequence[Metric]) -> None:
    """Add the states of replicas to the master's, in the order of their shards."""
    if not metrics:
        return
    for name, reduce in master._reductions.items():
        states = [getattr(master, name), *(getattr(metric, name) for metric in metrics)]
        setattr(master, name, _reduced(states, reduce, master.device))
    # As many updates as the whole batch would have been.
    master._update_count += max(metric._update_count for metric in metrics)
    master._computed = None


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
    calls = [recorder.calls for m in metrics if (recorder := _recorder(m)) is not None]
    device = next((m.device for m in master.modules() if isinstance(m, Metric)), None)
    for number in range(max(map(len, calls))):
        made = [(c[number], size) for c, size in zip(calls, sizes, strict=True) if number < len(c)]
        args, kwargs = batch.join(
            [call for call, _ in made], [size for _, size in made], device or torch.device("cpu")
        )
        master.update(*args, **kwargs)
