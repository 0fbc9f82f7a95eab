"""Convert dimensions to Ray Tune's domains."""

from typing import Any

from ray import tune

from lightning_mgpu.sweep.space.space import Choice, Dimension, Space


def to_domain(dimension: Dimension) -> Any:
    """Ray's domain of a dimension; an integer's upper end is exclusive there."""
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    if dimension.integer:
        kind = tune.lograndint if dimension.log else tune.randint
        return kind(int(dimension.low), int(dimension.high) + 1)
    kind = tune.loguniform if dimension.log else tune.uniform
    return kind(dimension.low, dimension.high)


def to_domains(space: Space) -> dict[str, Any]:
    """Ray's domains of the whole space."""
    return {name: to_domain(dimension) for name, dimension in space.dimensions.items()}
