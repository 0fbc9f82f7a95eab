"""Workers between two calls: warm as long as nobody else waits for what they hold."""

import time
from collections.abc import Callable
from typing import Any

import boring
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from lightning_mgpu.ray import RayStrategy, close, demand, worker_group

Nodes = list[tuple[dict[str, float], dict[str, float]]]


def _fit(num_workers: int) -> None:
    trainer = boring.trainer(RayStrategy(num_workers=num_workers), "auto", fast_dev_run=True)
    trainer.fit(boring.Classifier(), datamodule=boring.Blobs())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_task_finds_cpus_that_idle_workers_held() -> None:
    close()
    _fit(4)
    assert ray.available_resources().get("CPU", 0) == 0
    start = time.monotonic()
    assert ray.get(ray.remote(lambda: "done").remote(), timeout=60) == "done"
    assert time.monotonic() - start < 20, "they gave way by themselves"
    assert worker_group._groups == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_placement_group_of_others_ends_idle_workers(eventually: Callable[..., None]) -> None:
    close()
    _fit(2)
    group = placement_group([{"CPU": 1}] * 3)
    try:
        assert group.wait(20)
    finally:
        remove_placement_group(group)
    eventually(lambda: worker_group._groups == [])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_requests_that_do_not_concern_workers_leave_them_warm() -> None:
    close()
    _fit(1)
    (warm,) = worker_group._groups
    too_large = ray.remote(num_cpus=1000)(lambda: None).remote()
    other = placement_group([{"tape": 2}])
    more = ray.remote(num_cpus=0, resources={"tape": 1})(lambda: None).remote()
    assert ray.get(ray.remote(lambda: "free").remote()) == "free"
    time.sleep(3)
    assert worker_group._groups == [warm]
    ray.cancel(too_large)
    ray.cancel(more)
    remove_placement_group(other)
    close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_says_what_is_waited_for(eventually: Callable[..., None]) -> None:
    """None of it is public: a version of Ray that has no such thing is to be noticed here."""
    task = ray.remote(num_cpus=7)(lambda: None).remote()
    group = placement_group([{"CPU": 8}, {"CPU": 9}])
    expected: list[demand.Bundles] = [[{"CPU": 7.0}], [{"CPU": 8.0}, {"CPU": 9.0}]]
    eventually(lambda: all(request in demand.snapshot()[0] for request in expected), 20.0)
    assert [total["CPU"] for _, total in demand.snapshot()[1]] == [4]
    ray.cancel(task)
    remove_placement_group(group)


@pytest.mark.parametrize(
    ("request_", "free", "looks"),
    [
        ([{"CPU": 1.0}], {}, 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"CPU": 1.0}, 1),
        ([{"CPU": 1.0}], {"CPU": 1.0}, 5),  # it may be about to start, but does not
        ([{"CPU": 8.0}], {}, None),  # for ever too large
        ([{"tape": 1.0}], {}, None),  # not theirs
    ],
)
def test_who_makes_idle_workers_give_way(
    monkeypatch: pytest.MonkeyPatch,
    request_: list[dict[str, float]],
    free: dict[str, float],
    looks: int | None,
) -> None:
    seen = 0

    def snapshot() -> tuple[Any, Nodes]:
        nonlocal seen
        seen += 1
        return [request_], [(free, {"CPU": 2.0, "tape": 1.0})]

    monkeypatch.setattr(demand, "snapshot", snapshot)
    monkeypatch.setattr(demand, "_SECONDS", 0.0)
    assert demand.wait(["CPU"], 60.0, lambda: seen > 20)
    assert seen == (looks or 21)


def test_version_of_ray_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "snapshot", lambda: ray.no_such_thing)
    assert not demand.wait(["CPU"], 60.0, lambda: False)
