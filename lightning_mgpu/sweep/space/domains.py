"""Dimensions as Ray Tune writes them."""

from typing import Any

from ray import tune

from lightning_mgpu.sweep.space.space import Choice, Dimension, Space


def to_domain(dimension: Dimension) -> Any:
    """The same in Ray's words, where an integer's upper end is left out."""
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    if dimension.integer:
        kind = tune.lograndint if dimension.log else tune.randint
        return kind(int(dimension.low), int(dimension.high) + 1)
    kind = tune.loguniform if dimension.log else tune.uniform
    return kind(dimension.low, dimension.high)


def to_domains(space: Space) -> dict[str, Any]:
    """The whole space."""
    return {name: to_domain(dimension) for name, dimension in space.dimensions.items()}
