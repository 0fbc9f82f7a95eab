"""The model of BOHB: densities of good and of bad values, for each budget.

Falkner, Klein and Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale", 2018,
https://arxiv.org/abs/1807.01774, section 3 and algorithm 2, with the defaults of the authors' own
implementation. Two things differ: the bandwidth of a choice does not depend on the order of its
values, and a trial that failed counts as bad at every budget that it has not reached.

Each set of values is a point of the unit cube, whose coordinates are where a number lies in its
interval (on its scale), or the index of a choice::

    budget 27   .  .  .                      the largest budget with enough points is modelled:
    budget  9   .  .  .  .  .  .  .  .  .
                |good|  bad             |    draw from `good`, take what maximises good / bad
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mgpu.sweep.space.space import Choice, Dimension, Interval

GOOD_SHARE = 0.15  # of the points of a budget
RANDOM_SHARE = 1 / 3  # of the proposals
CANDIDATES = 64  # of which the best one is proposed
WIDENED = 3  # times the bandwidth, to draw candidates of numbers
MIN_BANDWIDTH = 1e-3

_LEAST = 1e-32  # of densities, so that their ratio is finite

Points = NDArray[np.float64]


class BohbModel:
    """Proposes values, and learns from the losses of those that it has proposed.

    All it knows is in its attributes: one that is pickled goes on with the same proposals.

    Args:
        dimensions: What is searched, by name.
        seed: Of all draws.
    """

    def __init__(self, dimensions: Mapping[str, Dimension], seed: int | None = None) -> None:
        self._dimensions = dict(dimensions)
        self._levels = [_levels(dimension) for dimension in dimensions.values()]
        self._generator = np.random.default_rng(seed)
        self._points: dict[str, Points] = {}
        self._losses: dict[str, dict[float, float]] = {}  # of each trial, by budget
        self._failed: set[str] = set()

    def propose(self, trial: str) -> dict[str, Any]:
        """Choose the values of a trial, which later calls name."""
        split = self._split()
        if split is None or self._generator.random() < RANDOM_SHARE:
            point = self._snap(self._random(1))[0]
        else:
            good, bad = (self._density(points) for points in split)
            candidates = self._snap(self._around(good))
            ratio = np.maximum(good(candidates), _LEAST) / np.maximum(bad(candidates), _LEAST)
            point = candidates[np.argmax(ratio)]
        self._points[trial], self._losses[trial] = point, {}
        return {
            name: _decode(float(coordinate), dimension)
            for (name, dimension), coordinate in zip(self._dimensions.items(), point, strict=True)
        }

    def observe(self, trial: str, budget: float, loss: float) -> None:
        """Learn the loss of a trial that was trained for a budget; one that is no number is bad.

        A trial that was not proposed is ignored: a resumed sweep may have one.
        """
        if trial in self._points and math.isfinite(loss):
            self._losses[trial][budget] = loss
            self._failed.discard(trial)  # it was tried again
        else:
            self._failed.add(trial)

    def fail(self, trial: str) -> None:
        """Learn that a trial has ended without a loss."""
        self._failed.add(trial)

    def _split(self) -> tuple[Points, Points] | None:
        """Good and bad points of the largest budget that has enough of both."""
        enough = len(self._dimensions) + 1
        budgets = {budget for losses in self._losses.values() for budget in losses}
        for budget in sorted(budgets, reverse=True):
            losses = {t: loss for t in self._points if (loss := self._loss(t, budget)) is not None}
            valued = sum(map(math.isfinite, losses.values()))
            if valued < enough or len(losses) < 2 * enough:
                continue
            order = sorted(losses, key=lambda trial: losses[trial])
            points = np.array([self._points[trial] for trial in order])
            good = min(valued, max(enough, int(GOOD_SHARE * len(order))))
            return points[:good], points[good:]
        return None

    def _loss(self, trial: str, budget: float) -> float | None:
        losses = self._losses[trial]
        if trial in self._failed and budget > max(losses, default=-math.inf):
            return math.inf
        return losses.get(budget)

    def _density(self, points: Points) -> "_Density":
        return _Density(points, self._levels)

    def _random(self, count: int) -> Points:
        columns = [self._generator.random(count) * (levels or 1) for levels in self._levels]
        return np.stack(columns, axis=1)

    def _around(self, density: "_Density") -> Points:
        """Candidates: points of a density, each moved by its kernel."""
        drawn = density.points[self._generator.integers(len(density.points), size=CANDIDATES)]
        moved = self._random(CANDIDATES)
        for column, (levels, bandwidth) in enumerate(
            zip(self._levels, density.bandwidths, strict=True)
        ):
            if levels:
                stays = self._generator.random(CANDIDATES) < 1 - bandwidth
                moved[stays, column] = drawn[stays, column]
            else:
                moved[:, column] = _truncated_normal(
                    drawn[:, column], WIDENED * bandwidth, moved[:, column]
                )
        return moved

    def _snap(self, points: Points) -> Points:
        """Move coordinates to those of the values that they stand for."""
        for column, dimension in enumerate(self._dimensions.values()):
            if isinstance(dimension, Choice):
                points[:, column] = np.floor(points[:, column])
            elif dimension.integer:
                points[:, column] = [
                    _middle(_decode(float(x), dimension), dimension) for x in points[:, column]
                ]
        return points


class _Density:
    """Kernel density: normal for numbers, Aitchison and Aitken's for choices.

    Args:
        points: Of shape (points, dimensions).
        levels: How many values each choice has; 0 for a number.
    """

    def __init__(self, points: Points, levels: list[int]) -> None:
        self.points, self._levels = points, levels
        count, dimensions = points.shape
        # The normal reference rule.
        spreads = [_spread(points[:, i], levels[i]) for i in range(dimensions)]
        bandwidths = 1.06 * np.array(spreads) * count ** (-1 / (4 + dimensions))
        self.bandwidths: Points = np.maximum(bandwidths, MIN_BANDWIDTH)
        for column, number in enumerate(levels):
            if number:  # with (number - 1) / number, all values are equally likely
                most = (number - 1) / number
                self.bandwidths[column] = min(self.bandwidths[column], most)

    def __call__(self, at: Points) -> Points:
        """The density at points, of shape (points, dimensions)."""
        kernels = np.ones((len(at), len(self.points)))
        for column, (levels, width) in enumerate(zip(self._levels, self.bandwidths, strict=True)):
            apart = at[:, column, None] - self.points[None, :, column]
            if levels:
                kernels *= np.where(apart == 0, 1 - width, width / max(levels - 1, 1))
            else:
                kernels *= np.exp(-0.5 * (apart / width) ** 2) / (width * math.sqrt(2 * math.pi))
        density: Points = kernels.mean(axis=1)
        return density


def _levels(dimension: Dimension) -> int:
    return len(dimension.values) if isinstance(dimension, Choice) else 0


def _spread(coordinates: Points, levels: int) -> float:
    """Standard deviation; for choices, that of two values with the same share of unequal pairs."""
    if not levels:
        return float(np.std(coordinates))
    shares = np.bincount(coordinates.astype(int), minlength=levels) / len(coordinates)
    return math.sqrt((1 - float(np.sum(shares**2))) / 2)


def _truncated_normal(means: Points, deviation: float, uniform: Points) -> Points:
    """Draw from normal distributions, cut off at 0 and 1, by uniform numbers."""
    drawn = []
    for mean, share in zip(means, uniform, strict=True):
        normal = NormalDist(float(mean), float(deviation))
        low, high = normal.cdf(0), normal.cdf(1)
        quantile = min(max(low + float(share) * (high - low), 1e-15), 1 - 1e-15)
        drawn.append(min(max(normal.inv_cdf(quantile), 0.0), 1.0))
    return np.array(drawn)


def _decode(coordinate: float, dimension: Dimension) -> Any:
    """The value at a coordinate."""
    if isinstance(dimension, Choice):
        return dimension.values[int(coordinate)]
    low, high = _ends(dimension)
    value = low + coordinate * (high - low)
    if dimension.log:
        value = math.exp(value)
    value = min(max(value, dimension.low), dimension.high)
    return int(value) if dimension.integer else float(value)


def _middle(value: int, dimension: Interval) -> float:
    """Coordinate of the middle of an integer's share of the scale."""
    low, high = _ends(dimension)
    ends = value, value + 1
    first, last = map(math.log, ends) if dimension.log else ends
    return ((first + last) / 2 - low) / (high - low)


def _ends(dimension: Interval) -> tuple[float, float]:
    """Ends of the scale; an integer's share of it is from itself to the next one."""
    low, high = dimension.low, dimension.high + dimension.integer
    return (math.log(low), math.log(high)) if dimension.log else (low, high)
