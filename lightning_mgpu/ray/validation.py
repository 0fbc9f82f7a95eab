"""Check the arguments of strategies on Ray."""

import numbers
from collections.abc import Sequence
from typing import Any

_PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def least_and_most(num_workers: float | Sequence[float]) -> tuple[int, int]:
    """Return the least and the most workers, where one number means both.

    Raises:
        ValueError: It says neither one whole number nor two.
    """
    given = (num_workers, num_workers) if isinstance(num_workers, numbers.Number) else num_workers
    both = [_whole(count) for count in given] if isinstance(given, Sequence) else []
    if len(both) != 2 or both[0] is None or both[1] is None:
        raise ValueError(
            f"`num_workers={num_workers!r}`: expected a number, or least and most, as (1, 4)."
        )
    if not 1 <= both[0] <= both[1]:
        raise ValueError(
            f"`num_workers={num_workers!r}`: expected 1 or more, and the least before the most."
        )
    return both[0], both[1]


def _whole(count: Any) -> int | None:
    """Convert a whole number, which searches and configs may have as 2.0; else `None`."""
    if isinstance(count, bool) or not isinstance(count, numbers.Real):
        return None
    number = float(count)
    return int(number) if number.is_integer() else None


def resources(strategy: str, devices: int, wanted: dict[str, float]) -> dict[str, float]:
    """Resources to reserve for each worker, without zeros.

    Args:
        strategy: Name of the strategy, for the error message.
        devices: On how many devices each worker trains.
        wanted: Resources by name, ``GPU`` among them.

    Raises:
        ValueError: An amount is negative, all are zero, or the GPUs are not those that a worker
            trains on.
    """
    for name, amount in wanted.items():
        if amount < 0:
            raise ValueError(f"Resource {name}={amount} of each worker: expected 0 or more.")
    if not any(wanted.values()):
        raise ValueError(
            f"Workers of `{strategy}` reserve nothing, so that Ray cannot place them: expected"
            " `num_cpus_per_worker` (a fraction will do), `use_gpu` or `resources_per_worker`."
        )
    gpus = wanted["GPU"]
    if gpus > devices or (devices > 1 and gpus not in (0, devices)):
        raise ValueError(
            f"`resources_per_worker={{'GPU': {gpus:g}}}`: a worker of `{strategy}` is one process"
            f" and trains on {devices} GPU{'s' if devices > 1 else ''}. Ask for more workers"
            " instead."
        )
    return {name: amount for name, amount in wanted.items() if amount}


def check_failures(max_failures: int) -> None:
    """Refuse a negative number."""
    if max_failures < 0:
        raise ValueError(f"`max_failures={max_failures}`: expected 0 or more.")


def check_placement(strategy: str) -> None:
    """Refuse placement strategies that Ray does not know."""
    if strategy not in _PLACEMENTS:
        raise ValueError(f"`placement_strategy={strategy!r}`: use one of {', '.join(_PLACEMENTS)}.")
