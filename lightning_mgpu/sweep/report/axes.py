"""Axes of a report's figures: positions, ticks and labels."""

import math
from dataclasses import dataclass
from typing import Any

from lightning_mgpu.format import short_names
from lightning_mgpu.sweep.report.model import Dimension, SweepHistory, Trial

_MANY_CHOICES = 12  # numbers of which there are more have an axis of numbers
_WIDE = 20.0  # from how many times the smallest on the metric has a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Axis of a metric or a searched value.

    Attributes:
        name: The value's.
        label: The same, as short as is clear.
        log: Whether the axis is logarithmic.
        categories: What stands at 0, 1, 2, ...; `None` on an axis of numbers.
        ticks: Where there are marks, and what is written there; on a logarithmic axis only.
        limits: Where the axis begins and ends; `None` to have it found by who draws.
    """

    name: str
    label: str
    log: bool = False
    categories: tuple[str, ...] | None = None
    ticks: tuple[tuple[float, str], ...] = ()
    limits: tuple[float, float] | None = None

    def place(self, value: Any) -> float:
        """Position of a value; on a logarithmic axis the value itself."""
        if self.categories is not None:
            return float(self.categories.index(text(value)))
        return float(value)

    def linear(self, value: Any) -> float:
        """Position of a value on paper."""
        place = self.place(value)
        return math.log10(place) if self.log else place

    def marks(self) -> tuple[tuple[float, str], ...]:
        """Explicit ticks, where the plotting library is not to choose them."""
        if self.categories is not None:
            return tuple((float(at), shorten(name, 15)) for at, name in enumerate(self.categories))
        return self.ticks


def metric_axis(sweep: SweepHistory) -> Axis:
    """Axis of the metric; logarithmic where a loss ranges over orders of magnitude."""
    values = [value for trial in sweep.trials for _, value in sweep.history(trial)]
    label = sweep.metric
    if sweep.mode == "min" and values and min(values) > 0 and max(values) > _WIDE * min(values):
        return Axis(sweep.metric, label, log=True, ticks=log_ticks(min(values), max(values)))
    return Axis(sweep.metric, label)


def axis_of(sweep: SweepHistory, dimension: Dimension) -> Axis:
    """Axis of a searched value."""
    name = dimension.name
    label = short_names([one.name for one in sweep.dimensions])[name]
    values = [trial.params[name] for trial in sweep.trials if name in trial.params]
    known = [*_choices(dimension), *values]
    if dimension.choices is not None and not all(map(is_number, known)):
        return _categorical(name, label, list(dict.fromkeys(map(text, known))))
    if _is_listed(dimension) and len(set(known)) <= _MANY_CHOICES:
        return _categorical(name, label, list(map(text, sorted(set(known)))))
    low, high = min(known), max(known)
    is_wide = low > 0 and high > 3 * low  # or there are hardly any marks
    log = is_wide and (dimension.log or (dimension.choices is not None and high > 100 * low))
    if log:
        limits = low * (low / high) ** 0.04, high * (high / low) ** 0.04
        return Axis(name, label, log=True, ticks=log_ticks(low, high), limits=limits)
    margin = 0.04 * (high - low)
    return Axis(name, label, limits=(low - margin, high + margin) if margin else None)


def _is_listed(dimension: Dimension) -> bool:
    is_short = dimension.integer and dimension.high - dimension.low < _MANY_CHOICES
    return dimension.choices is not None or is_short


def _choices(dimension: Dimension) -> list[Any]:
    """Possible values; of an interval its ends, and all integers if they are few."""
    if dimension.choices is not None:
        return list(dimension.choices)
    if _is_listed(dimension):
        return list(range(int(dimension.low), int(dimension.high) + 1))
    return [dimension.low, dimension.high]


def _categorical(name: str, label: str, categories: list[str]) -> Axis:
    return Axis(name, label, categories=tuple(categories), limits=(-0.6, len(categories) - 0.4))


def log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Ticks of a logarithmic axis, at most about eight."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    steps = (1, 2, 5) if span <= 1.6 else (1, 3) if span <= 2.6 else (1,)
    every = math.ceil(span / 8)
    places = [step * 10.0**decade for decade in decades if decade % every == 0 for step in steps]
    margin = 1.05
    return tuple((at, f"{at:g}") for at in places if low / margin <= at <= high * margin)


def is_number(value: Any) -> bool:
    """Return whether `value` is a number other than a `bool`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: Any) -> str:
    """Format a value for readers."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten(words: str, length: int = 18) -> str:
    """Shorten long text by leaving out its middle."""
    half = (length - 1) // 2
    return words if len(words) <= length else f"{words[:half]}…{words[-half:]}"


def jitter(axis: Axis, trial: Trial) -> float:
    """Offset to keep values of one category apart."""
    if axis.categories is None:
        return 0.0
    return ((trial.number * 0.618034) % 1 - 0.5) * 0.4
