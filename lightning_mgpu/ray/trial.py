"""What a Ray Tune trial that runs in this process has reserved for workers."""

from collections.abc import Mapping

import ray
from ray.util.placement_group import get_current_placement_group

__all__: list[str] = []


def reservation(count: int, resources: Mapping[str, float]) -> str | None:
    """The trial's own placement group, if its bundles after the first are those of the workers.

    So what `get_tune_resources` asks for is what the workers take, and nothing is counted twice.

    Args:
        count: Number of workers.
        resources: What each of them needs.
    """
    if not ray.is_initialized():
        return None
    group = get_current_placement_group()
    if group is None:
        return None
    bundles = group.bundle_specs[1:]
    for bundle in bundles[:count]:
        if any(bundle.get(name, 0) < amount for name, amount in resources.items()):
            return None
    return group.id.hex() if len(bundles) >= count else None
