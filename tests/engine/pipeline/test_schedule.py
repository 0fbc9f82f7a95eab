"""The timetable, where to cut, and how batches are split and joined: properties."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mgpu.engine.pipeline import microbatch
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.outputs import columns, joining
from lightning_mgpu.engine.pipeline.partition.balance import balance
from lightning_mgpu.engine.pipeline.runtime import schedule
from lightning_mgpu.engine.pipeline.runtime.turns import Turns

SHAPES = {"stages": st.integers(1, 8), "chunks": st.integers(1, 20)}


def test_timetable_of_three_stages_and_four_chunks() -> None:
    made = schedule.timetable((0, 1, 2), 4, 3)
    assert [sorted((stage, chunk) for chunk, stage in tick) for tick in made.ticks] == [
        [(0, 0)],
        [(0, 1), (1, 0)],
        [(0, 2), (1, 1), (2, 0)],
        [(0, 3), (1, 2), (2, 1)],
        [(1, 3), (2, 2)],
        [(2, 3)],
    ]


@given(**SHAPES)
def test_stages_wait_for_their_bubble(stages: int, chunks: int) -> None:
    share = (stages - 1) / (chunks + stages - 1)
    assert schedule.waiting([2.0] * stages, chunks) == pytest.approx(share)


def test_stages_wait_for_the_slowest() -> None:
    # Ticks of 1, 3 and 3 and 3: the first stage works 3 of 10, the second 9.
    assert schedule.waiting([1.0, 3.0], 3) == pytest.approx(1 - (3 + 9) / 20)


@settings(deadline=None)
@given(costs=st.lists(st.integers(0, 50), min_size=1, max_size=8), data=st.data())
def test_balance_is_the_best_there_is(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    counts = balance(costs, stages)
    assert len(counts) == stages
    assert sum(counts) == len(costs)
    assert min(counts) >= 1
    best = min(
        _dearest(costs, [0, *cuts, len(costs)])
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert _dearest(costs, [0, *itertools.accumulate(counts)]) == best


@given(total=st.integers(0, 50), count=st.integers(1, 20), least=st.integers(1, 3))
def test_sizes_are_even_and_complete(total: int, count: int, least: int) -> None:
    sizes = microbatch.sizes(total, count, least)
    assert sum(sizes) == total
    assert len(sizes) <= count
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or min(sizes) >= least


@settings(deadline=None)
@given(total=st.integers(1, 30), count=st.integers(1, 12), factor=st.integers(1, 3))
def test_join_undoes_cut(total: int, count: int, factor: int) -> None:
    tensors = {"x": torch.arange(total * 2).view(total, 2), "mask": torch.ones(3, 3)}
    counts = microbatch.sizes(total, count)
    chunks = microbatch.cut(tensors, {"x": 0}, counts)
    assert [len(chunk["x"]) for chunk in chunks] == counts
    assert all(chunk["mask"] is tensors["mask"] for chunk in chunks)
    repeated = [chunk["x"].repeat_interleave(factor, 0) for chunk in chunks]
    layouts = {"output": joining.FIRST}
    joined, rows = joining.join(repeated, counts, "output", layouts)
    expected = tensors["x"].repeat_interleave(factor, 0)
    assert torch.equal(joined, expected)
    for part, made in zip(rows.split(expected, len(counts)), repeated, strict=True):
        assert torch.equal(part, made)


def test_join_takes_what_does_not_depend_on_the_batch_once() -> None:
    table = torch.ones(5, 2)
    layouts = {"output": joining.OutputLayout(None)}
    joined, rows = joining.join([table, table.clone()], [2, 2], "output", layouts)
    assert joined is table
    gradient = torch.ones(5, 2)
    first, second = rows.split(gradient, 2)
    assert torch.equal(first + second, gradient)


def test_join_of_numbers_is_a_mean_over_samples() -> None:
    joined, rows = joining.join([torch.tensor(1.0), torch.tensor(4.0)], [2, 1], "output", {})
    assert joined == 2
    assert rows.split(torch.tensor(3.0), 2) == [2, 1]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.tensor(1), torch.tensor(2)], "without dimensions"),
        ([torch.ones(3, 3), torch.ones(3, 3)], "whose first dimension is not the batch"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "whose first dimension is not the batch"),
    ],
)
def test_join_refuses_what_is_no_batch(parts: list[Tensor], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        joining.join(parts, [2, 2], "output", {})


@pytest.mark.parametrize("parts", [[1.5, 2.5], [2, 2]])
def test_values_that_differ_or_count_samples_are_refused(parts: list[float]) -> None:
    with pytest.raises(SplitError, match="cannot be joined"):
        columns.same(parts, [2, 2], "output")


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
def test_visits_of_a_straight_way_are_the_timetable(stages: int, chunks: int) -> None:
    made = schedule.timetable(tuple(range(stages)), chunks, stages)
    assert made.at_once == min(stages, chunks)
    for stage, order in enumerate(made.orders):
        assert [visit.chunk for visit in order] == list(range(chunks))
        assert {visit.number for visit in order} == {stage}


@given(way=st.lists(st.integers(0, 3), min_size=1, max_size=8), chunks=st.integers(1, 6))
def test_visits_of_any_way_are_complete_and_can_be_made(way: list[int], chunks: int) -> None:
    made = schedule.timetable(tuple(way), chunks, 4)
    every = {(chunk, number) for chunk in range(chunks) for number in range(len(way))}
    assert sorted(every) == sorted((v.chunk, v.number) for order in made.orders for v in order)
    done = [0] * chunks
    remaining = [list(order) for order in made.orders]
    while any(remaining):
        under_way = [chunk for chunk in range(chunks) if done[chunk] < len(way)][: made.at_once]
        ready = [
            order
            for order in remaining
            if order and order[0].chunk in under_way and done[order[0].chunk] == order[0].number
        ]
        assert ready, "they wait for each other"
        for order in ready:
            done[order.pop(0).chunk] += 1


def test_timetable_of_two_stages_on_each_of_two_devices() -> None:
    made = schedule.timetable((0, 1, 0, 1), 4, 2)
    assert [[(v.chunk, v.number) for v in order] for order in made.orders] == [
        [(0, 0), (1, 0), (0, 2), (1, 2), (2, 0), (3, 0), (2, 2), (3, 2)],
        [(0, 1), (1, 1), (0, 3), (1, 3), (2, 1), (3, 1), (2, 3), (3, 3)],
    ]
    assert made.at_once == 2


@given(devices=st.integers(1, 5), per_device=st.integers(1, 4), more=st.integers(0, 12))
def test_several_stages_on_a_device_leave_its_bubble_to_one_of_them(
    devices: int, per_device: int, more: int
) -> None:
    chunks = devices + more
    made = schedule.timetable(tuple(range(devices)) * per_device, chunks, devices)
    assert len(made.ticks) == per_device * chunks + devices - 1
    if chunks % devices == 0:
        assert made.at_once == devices
    share = chunks / (chunks + (devices - 1) / per_device)
    stages = [2.0] * devices * per_device
    assert schedule.waiting(stages, chunks, devices) == pytest.approx(1 - share)


@settings(max_examples=30)
@given(
    expected=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    ways=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=6),
)
def test_nobody_waits_for_ever_whatever_ways_are_taken(
    expected: list[int], ways: list[list[int]]
) -> None:
    made = schedule.timetable(tuple(expected), len(ways), 3)
    turns = Turns(made.orders, [0, 1, 2])
    todo, done = iter(range(len(ways))), []

    def work() -> None:
        for chunk in todo:
            for number, stage in enumerate(ways[chunk]):
                turns.enter(chunk, stage, number)
                turns.leave(stage)
            turns.finish(chunk)
            done.append(chunk)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(made.at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    turns.close()
    assert sorted(done) == list(range(len(ways)))


def _dearest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
