"""Say how many trials a sweep will run, and of what."""

import math
from typing import TYPE_CHECKING

from lightning_mgpu.sweep.settings.nodes import is_grid, is_population
from lightning_mgpu.sweep.space.space import Space, count, enumerate_grid

if TYPE_CHECKING:
    from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf


def extent(options: "RayTuneSweeperConf", space: Space, num_samples: int) -> str:
    """One line on the trials of a sweep.

    Args:
        options: The sweep's.
        space: What is searched.
        num_samples: How many trials there will be.
    """
    sizes = [size for dimension in space.dimensions.values() if (size := count(dimension))]
    is_finite = len(sizes) == len(space.dimensions)
    points, product = math.prod(sizes), " × ".join(map(str, sizes))
    has_shape = len(sizes) > 1 and not space.conditions
    if is_finite and space.conditions:
        points = len(enumerate_grid(space))
    shape = f" ({product})" if has_shape else ""
    trials = f"{num_samples} trial{'s' if num_samples > 1 else ''}"
    if not sizes and is_finite:
        return f"{trials}: nothing is searched."
    if is_grid(options):
        if num_samples < points:
            return f"{trials}: the first of {points} combinations{shape}."
        asked = options.num_samples or 0
        more = f"; hydra.sweeper.num_samples={asked} asks for more than there are"
        made_of = f": {product}" if has_shape else ""
        return f"{trials}{made_of}{more if asked > points else ''}."
    default = "" if options.num_samples else " (hydra.sweeper.num_samples is not set)"
    changes = is_population(options)  # the values of trials that began alike
    if is_finite and points < num_samples and not changes:
        return (
            f"{trials}{default} of {points} combinations{shape}, so that some run more than"
            " once. hydra/sweeper/search_alg=grid runs each once."
        )
    return f"{trials}{default}, chosen by hydra/sweeper/search_alg={options.search_alg.name}."
