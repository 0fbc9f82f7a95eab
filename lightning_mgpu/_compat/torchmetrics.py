"""The states of a torchmetrics metric, beside what its subclasses compute from them."""

from collections.abc import Callable, Mapping
from typing import Any

from torchmetrics import Metric

from lightning_mgpu._compat.release import assign

Reduction = str | Callable[..., Any] | None


def reductions_of(metric: Metric) -> Mapping[str, Reduction]:
    """Reductions that join the states of several processes, by the state's name."""
    return metric._reductions


def note_updates(metric: Metric, count: int) -> None:
    """Have a metric, whose states were set by hand, know of `count` more updates.

    What it has computed of its earlier states is forgotten.
    """
    assign(metric, "_update_count", metric.update_count + count, "torchmetrics")
    assign(metric, "_computed", None, "torchmetrics")
