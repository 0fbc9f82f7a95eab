"""What torch's flight recorder tells of collectives; the layout is nowhere documented."""

import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lightning_mgpu._compat import torch_collectives as compat
from lightning_mgpu._compat.torch import forget_failed_group


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[compat.GroupId]]:
    """The groups that there were before; now there is one, of one process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # it will be set
    before = set(compat.collective_counts())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield before
    dist.destroy_process_group()
    forget_failed_group()


def _counts(earlier: set[compat.GroupId]) -> list[tuple[int, int]]:
    found = compat.collective_counts()
    return [counts for group, counts in found.items() if group not in earlier]


def test_collectives_are_recorded_in_their_order(earlier: set[compat.GroupId]) -> None:
    assert compat.recorded_collectives(earlier) == []
    dist.all_reduce(torch.ones(2, 3))
    dist.broadcast(torch.ones(4, dtype=torch.int64), 0)
    dist.barrier()
    dist.all_gather([torch.ones(1)], torch.ones(1))
    _, reduced, *_ = found = _settled(earlier)
    assert [(each.number, each.operation, each.shapes) for each in found] == [
        (1, "all_reduce", ((2, 3),)),
        (2, "broadcast", ((4,),)),
        (3, "barrier", ()),
        (4, "all_gather", ((1,),)),
    ]
    assert reduced.dtypes == ("Long",)
    assert {each.group for each in found} == {"0"}
    assert _counts(earlier) == [(4, 4)]


def test_collectives_of_ddp_are_recorded(earlier: set[compat.GroupId]) -> None:
    """Its reducer starts them in C++, where nothing of Python sees them."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 3))
    before = len(compat.recorded_collectives(earlier))
    model(torch.ones(1, 2)).sum().backward()
    (reduction,) = _settled(earlier)[before:]
    assert (reduction.operation, reduction.shapes) == ("all_reduce", ((9,),))


def test_collective_that_waits_is_told_from_one_that_has_ended(
    earlier: set[compat.GroupId],
) -> None:
    store = dist.HashStore()
    groups: dict[int, dist.ProcessGroupGloo] = {}

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2)

    other = threading.Thread(target=join, args=[1])
    other.start()
    join(0)
    other.join()
    work = groups[0].barrier()
    (waiting,) = compat.recorded_collectives(earlier)
    assert not waiting.done
    ((started, ended),) = _counts(earlier)
    assert started != ended
    groups[1].barrier().wait()
    work.wait()
    assert [each.operation for each in _settled(earlier)] == ["barrier", "barrier"]


def test_groups_tell_their_ranks(earlier: set[compat.GroupId]) -> None:
    group = dist.new_group([0])
    dist.barrier(group)
    assert compat.group_members() == {"0": (0,), "1": (0,)}
    assert [each.group for each in _settled(earlier)] == ["1"]


def _settled(earlier: set[compat.GroupId]) -> list[compat.RecordedCollective]:
    """What is recorded when all have ended, which is noted a moment later."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = compat.recorded_collectives(earlier)
        if all(each.done for each in found):
            return found
        time.sleep(0.01)
    raise AssertionError(found)
