"""One place that a step has changed on the replicas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import Additions, is_number
from lightning_mgpu.engine.data_parallel.side_effects.equality import MISSING
from lightning_mgpu.engine.data_parallel.side_effects.scalars import is_integer


@dataclass
class Change:
    """One place that replicas have changed.

    Attributes:
        name: Of the place.
        before: Its value at the start of the step.
        values: The replicas' values now.
        evidence: For each replica but the first: the additions that made it, if it was those.
        is_key: Whether the place is an entry of a dict rather than an attribute.
        is_count: Whether it is likely a count of samples: new to a dict, or in a `Counter`.
        owner: What warnings are said once for; default: the place.
    """

    name: str
    before: Any
    values: Sequence[Any]
    evidence: Sequence[Additions | None]
    is_key: bool = False
    is_count: bool = False
    owner: str = ""


def of_new_key(change: Change) -> Change:
    """A key that is new to a dict: whole numbers are taken for counts that began at zero."""
    values = change.values
    present = [value for value in values if value is not MISSING]
    if not all(is_number(value) and is_integer(value) for value in present):
        return change
    evidence = [e or Additions(constant=False, count=1) for e in change.evidence]
    filled = [0 if value is MISSING else value for value in values]
    return Change(change.name, 0, filled, evidence, True, True, change.owner)
