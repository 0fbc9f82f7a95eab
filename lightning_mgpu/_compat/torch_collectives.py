"""What `torch.distributed` records of this process's collectives, whoever starts them.

Its flight recorder has those of Gloo and NCCL, of DDP's reducer in C++ among them.
It is always on, but for ``TORCH_FR_BUFFER_SIZE=0``. Older releases have none for Gloo, and one for
NCCL that is off by default.
"""

import pickle
from dataclasses import dataclass
from typing import Any

import torch

_RECORDERS = [
    recorder
    for name in ("_dump_fr_trace", "_dump_nccl_trace")
    if (recorder := getattr(getattr(torch._C, "_distributed_c10d", None), name, None)) is not None
]
"""Of Gloo, and of NCCL where torch was built with it."""

GroupId = tuple[int, int]
"""A process group within this process: the index of its recorder, and its number there."""


@dataclass(frozen=True)
class RecordedCollective:
    """One collective that this process has started.

    Attributes:
        group: The name of its process group, the same on all of its ranks.
        number: Its place among the collectives of the group, from 1.
        operation: Such as ``"all_reduce"``.
        shapes: Of its inputs.
        dtypes: Of its inputs, as ``"Float"``.
        done: Whether it has ended.
    """

    group: str
    number: int
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    done: bool


def collective_counts() -> dict[GroupId, tuple[int, int]]:
    """Numbers of the last operation that was started, and of the last that has ended.

    Returns:
        By process group, of those that have been left as well. Operations that run at the same time
        may end in another order, so the two may differ although nothing runs.
    """
    return {
        (recorder, int(group)): (status["last_enqueued_collective"], _ended(status))
        for recorder, found in enumerate(_dumps(False))
        for group, status in found.get("pg_status", {}).items()
    }


def recorded_collectives(without: set[GroupId]) -> list[RecordedCollective]:
    """The last collectives (2000 by default), in the order in which they were started.

    Takes tens of milliseconds.

    Args:
        without: Process groups to leave out.
    """
    return [
        _collective(entry, in_order=recorder > 0, status=found.get("pg_status", {}))
        for recorder, found in enumerate(_dumps(True))
        for entry in found.get("entries", ())
        if (recorder, entry["pg_id"]) not in without and not entry["is_p2p"]
    ]


def group_members() -> dict[str, tuple[int, ...]]:
    """The process groups that this process is in: their names, and their ranks."""
    from torch.distributed.distributed_c10d import _world

    # Another thread may be leaving them.
    ranks = dict(_world.pg_group_ranks)
    names = list(_world.pg_names.items())
    return {name: tuple(ranks[group]) for group, name in names if group in ranks}


def _collective(
    entry: dict[str, Any], in_order: bool, status: dict[str, dict[str, int]]
) -> RecordedCollective:
    number = entry["collective_seq_id"]
    # NCCL's end in order, and parts of a coalesced one are not marked by themselves.
    passed = in_order and number <= _ended(status.get(str(entry["pg_id"]), {}))
    return RecordedCollective(
        entry["process_group"][0],
        number,
        entry["profiling_name"].partition(":")[2],
        tuple(tuple(sizes) for sizes in entry["input_sizes"]),
        tuple(entry["input_dtypes"]),
        entry["retired"] or passed,
    )


def _ended(status: dict[str, int]) -> int:
    return status.get("last_completed_collective", -1)


def _dumps(entries: bool) -> list[dict[str, Any]]:
    dumps = [recorder(entries, False, False) for recorder in _RECORDERS]
    return [pickle.loads(dump) if dump else {} for dump in dumps]
