"""Bundles that a Ray Tune trial in this process has reserved for workers."""

from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import get_current_placement_group


@dataclass(frozen=True)
class TrialBundles:
    """Bundles of a trial's placement group, one for each worker.

    Attributes:
        group: Id of the placement group.
        first: Index of the first bundle; the trial itself may have one before it.
    """

    group: str
    first: int


def reserved(count: int, resources: Mapping[str, float]) -> TrialBundles | None:
    """Bundles that the trial has reserved for workers; `None` without a trial or if too few.

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
    # Where the trial's process needs nothing itself, it has no bundle.
    first = 1 if ray.get_runtime_context().get_assigned_resources() else 0
    bundles = group.bundle_specs[first : first + count]
    if len(bundles) < count or any(
        bundle.get(name, 0) < amount for bundle in bundles for name, amount in resources.items()
    ):
        return None
    return TrialBundles(group.id.hex(), first)
