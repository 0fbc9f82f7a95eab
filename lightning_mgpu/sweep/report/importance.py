"""Importance of each searched value for the metric."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_mgpu.sweep.report.axes import Axis, axis_of, metric_axis
from lightning_mgpu.sweep.report.model import SweepHistory
from lightning_mgpu.sweep.report.views import common

if TYPE_CHECKING:
    import optuna

_AT_LEAST = 5  # trials, to say anything


@dataclass(frozen=True)
class Importance:
    """Shares of the metric's variance, by searched value.

    Attributes:
        method: How they were found, in words.
        shares: By the value's name, the largest first.
    """

    method: str
    shares: dict[str, float]


def importance(sweep: SweepHistory) -> Importance | None:
    """Estimate importances; `None` with too few trials, or if nothing differs."""
    found = sweep.valued()
    scale = metric_axis(sweep)
    values = [scale.linear(value) for _, value in found]
    columns = {
        axis: [axis.place(trial.params[axis.name]) for trial, _ in found]
        for axis in (axis_of(sweep, dimension) for dimension in common(sweep))
    }
    columns = {axis: column for axis, column in columns.items() if len(set(column)) > 1}
    if len(found) < _AT_LEAST or len(set(values)) < 2 or not columns:
        return None
    if find_spec("optuna") is not None and find_spec("sklearn") is not None:
        method, shares = "fANOVA", _fanova(sweep, columns, values)
    else:
        method = "epsilon squared, each value on its own"
        groups = {axis.name: _groups(axis, column) for axis, column in columns.items()}
        shares = {name: _epsilon_squared(group, values) for name, group in groups.items()}
    if scale.log:
        method += f", of log {sweep.metric}"
    return Importance(method, dict(sorted(shares.items(), key=lambda item: -item[1])))


def _fanova(
    sweep: SweepHistory, columns: dict[Axis, list[Any]], values: Sequence[float]
) -> dict[str, float]:
    """Importances by Optuna's fANOVA: from a forest that predicts the metric."""
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )

    distributions: dict[str, BaseDistribution] = {}
    for axis, column in columns.items():
        if axis.categories is not None:
            distributions[axis.name] = CategoricalDistribution(tuple(range(len(axis.categories))))
        else:  # population-based training leaves the interval
            distributions[axis.name] = FloatDistribution(min(column), max(column), log=axis.log)
    study = _study()
    for number, value in enumerate(values):
        params = {axis.name: column[number] for axis, column in columns.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _study() -> "optuna.Study":
    """Empty study in memory, without Optuna's log lines."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(storage=optuna.storages.InMemoryStorage())
    finally:
        optuna.logging.set_verbosity(level)


def _groups(axis: Axis, column: Sequence[float]) -> list[int]:
    """Group of each trial: by category, or by quartile of rank."""
    if axis.categories is not None:
        return [int(place) for place in column]
    order = sorted(range(len(column)), key=lambda index: column[index])
    groups = [0] * len(column)
    for rank, index in enumerate(order):
        groups[index] = rank * min(4, len(column) // 2) // len(column)
    return groups


def _epsilon_squared(groups: Sequence[int], values: Sequence[float]) -> float:
    """Share of the variance explained by groups, corrected for chance (Kelley 1935)."""
    by_group = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        by_group[group].append(value)
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    within = sum(
        (value - sum(members) / len(members)) ** 2
        for members in by_group.values()
        for value in members
    )
    free = len(values) - len(by_group)
    if free <= 0:
        return 0.0
    return max(0.0, (total - within - (len(by_group) - 1) * within / free) / total)
