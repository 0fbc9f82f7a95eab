"""Environment variables that name the rank of a process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_mgpu.variables import restored

if TYPE_CHECKING:
    from lightning_mgpu.launch.rank import Rank

_MARK = "LIGHTNING_MGPU_LAUNCHED"

# A rank's own place; a worker gets it from its `Rank`, never from the caller's environment.
RANK_VARIABLES = frozenset(
    {
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "JSM_NAMESPACE_RANK"),
        "SLURM_NTASKS",  # by which Lightning knows that SLURM has started the ranks
        _MARK,
    }
)


def of_rank(
    rank: "Rank",
    local_rank: int | None = None,
    local_world_size: int | None = None,
    node_rank: int = 0,
) -> dict[str, str]:
    """The variables of a rank, named and counted as by ``torchrun``.

    They are for code that shards data by them. The ranks themselves find each other without, so
    there is no address and no port.

    Args:
        rank: The rank.
        local_rank: Its number on its node; default: all ranks are on one.
        local_world_size: How many ranks are on its node; default: all.
        node_rank: The number of its node.
    """
    return {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.rank if local_rank is None else local_rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_WORLD_SIZE": str(rank.world_size if local_world_size is None else local_world_size),
        "NODE_RANK": str(node_rank),
        "GROUP_RANK": str(node_rank),
        _MARK: "1",
    }


def come_from_a_launch() -> bool:
    """Return whether a launch of ours has set the variables, here or in a parent process.

    If not, somebody has started this process as one of several ranks.
    """
    return _MARK in os.environ


@contextmanager
def shown(rank: "Rank") -> Iterator[None]:
    """Context in which the variables are set in this process."""
    ours = of_rank(rank)
    with restored(*ours):
        os.environ.update(ours)
        yield
