"""How many workers there are, where the strategy leaves that open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from configs import config
from hydra.utils import instantiate
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray import RayStrategy, close, cluster, worker_group

_TAPE = {"tape": 1.0}  # the cluster has two


@contextmanager
def _held(group: PlacementGroup) -> Iterator[int]:
    """Somebody holds what was reserved; how many bundles."""
    try:
        assert group.wait(10)
        yield group.bundle_count
    finally:
        remove_placement_group(group)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_as_many_are_reserved_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    close()
    for name in ("_SETTLE_SECONDS", "_NEXT_SECONDS", "_WARNING_SECONDS", "_RESOURCES_SECONDS"):
        monkeypatch.setattr(cluster, name, 1.0)

    def everything_is_free() -> None:
        eventually(lambda: ray.available_resources().get("tape") == 2, 10)

    everything_is_free()
    with _held(cluster.reserve(_TAPE, 1, 2)) as count:
        assert count == 2
    everything_is_free()
    with _held(placement_group([_TAPE])), _held(cluster.reserve(_TAPE, 1, 4)) as count:
        assert count == 1
    everything_is_free()
    with (
        _held(placement_group([_TAPE] * 2)),
        pytest.raises(LaunchError, match=r"ask for 1 × \(tape: 1\).*of which free: CPU: 4\."),
    ):
        cluster.reserve(_TAPE, 1, 4)
    with pytest.raises(LaunchError, match=r"ask for 2 × .* with placement STRICT_SPREAD"):
        cluster.reserve(_TAPE, 2, 2, "STRICT_SPREAD")


class _Workers:
    """A group that starts nothing: as many workers as `room` has for them."""

    room = 0

    def __init__(self, request: worker_group.WorkerRequest) -> None:
        self.request, self.busy = request, True
        self.size = max(request.least, min(request.most, self.room))
        self.is_alive, self.is_stale = lambda: True, lambda: False
        self.wake = self.close = lambda: None


def test_warm_workers_give_way_to_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "WorkerGroup", _Workers)
    monkeypatch.setattr(worker_group, "_groups", [])
    free = 0

    def take(strategy: RayStrategy) -> Any:
        workers = worker_group.take(strategy.group())
        workers.busy = False
        return workers

    monkeypatch.setattr(worker_group.WorkerRequest, "fits", lambda group, count: count <= free)
    elastic, fixed = RayStrategy(num_workers=(2, 4)), RayStrategy(num_workers=3)
    _Workers.room = 2
    first = take(elastic)
    assert first.size == 2
    assert take(elastic) is first, "there is no room for more"
    free, _Workers.room = 1, 3
    second = take(elastic)
    assert (second.size, worker_group._groups) == (3, [second])
    _Workers.room = 9
    third = take(elastic)
    assert third.size == 4
    assert take(elastic) is third, "there are enough"
    assert take(fixed).size == 3


def test_number_and_placement_of_workers_are_checked() -> None:
    group = RayStrategy(num_workers=[2, 5], placement_strategy="SPREAD").group()
    assert (group.least, group.most, group.placement) == (2, 5, "SPREAD")
    composed = instantiate(config("+strategy=ray", "strategy.num_workers=[1,4]").strategy)
    assert (composed.min_workers, composed.num_workers, composed.world_size) == (1, 4, 4)
    for wrong in ((1, 2, 3), "14", (1.5, 2)):
        with pytest.raises(ValueError, match=r"num_workers=.*a number, or least and most"):
            RayStrategy(num_workers=wrong)  # type: ignore[arg-type]
    for wrong in (0, (0, 4), (4, 1)):
        with pytest.raises(ValueError, match=r"num_workers=.*1 or more, and the least before"):
            RayStrategy(num_workers=wrong)
    with pytest.raises(ValueError, match=r"placement_strategy='NEAR'`: use one of PACK, SPREAD"):
        RayStrategy(placement_strategy="NEAR")
