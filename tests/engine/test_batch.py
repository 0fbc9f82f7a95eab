"""Batches taken apart and put together."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_mgpu.engine.batch import (
    BatchLayout,
    Hint,
    JoinMemory,
    gather,
    join,
    join_samples,
    map_leaves,
    scatter,
    split,
    weighted_mean,
)

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    note: Any


class Named(NamedTuple):
    x: Any
    y: Any


def _nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any nesting of containers around leaves."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
            st.builds(Named, inner, inner),
            st.builds(Frozen, inner, inner),
        ),
        max_leaves=6,
    )


ENTRIES: list[Callable[[int], Any]] = [
    lambda i: f"text {i}",
    lambda i: [i] * (i % 3),
    lambda i: {"id": i, "boxes": torch.full((i % 4, 4), float(i))},
    lambda i: torch.full((1 + i, 2), float(i)),
    lambda i: None if i % 2 else i / 2,
    lambda i: Path(f"{i}.png"),
]


@st.composite
def _batches(draw: st.DrawFn) -> tuple[Any, int]:
    """A batch with columns in any nesting, and lists with an entry per sample among them."""
    size = draw(st.integers(8, 11))  # so that a half has more than any list of columns has entries
    leaves = (
        torch.arange(size),
        torch.arange(3.0 * size).reshape(size, 3),
        np.arange(2 * size).reshape(size, 2),
        *([make(i) for i in range(size)] for make in ENTRIES),
        *(tuple(make(i) for i in range(size)) for make in ENTRIES),
    )
    skeleton = draw(_nested(st.integers(0, len(leaves) - 1)))
    return {"x": torch.arange(size), "rest": map_leaves(leaves.__getitem__, skeleton)}, size


def _equal(a: Any, b: Any) -> bool:
    leaves: list[Any] = []
    map_leaves(leaves.append, a)
    others: list[Any] = []
    map_leaves(others.append, b)
    return len(leaves) == len(others) and all(
        type(x) is type(y) and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(leaves, others, strict=True)
    )


@given(_batches(), st.integers(1, 2))
def test_joined_shards_are_the_batch(batch_and_size: tuple[Any, int], count: int) -> None:
    batch, size = batch_and_size
    shards = split(batch, count)
    sizes = [shard.size for shard in shards]
    assert sum(sizes) == size
    assert len(shards) == min(count, size)
    assert max(sizes) - min(sizes) <= 1
    joined = join([shard.batch for shard in shards], sizes, CPU)
    assert type(joined) is type(batch)
    assert _equal(joined, batch)


@given(_batches(), st.randoms())
def test_samples_are_taken_in_any_order(batch_and_size: tuple[Any, int], random: Any) -> None:
    batch, size = batch_and_size
    shards = split(batch, 2)
    samples = join_samples([shard.batch for shard in shards], [shard.size for shard in shards])
    assert samples is not None
    assert _equal(samples.take(np.arange(size)), batch)
    order = np.array(random.sample(range(size), size))
    assert samples.take(order)["x"].tolist() == order.tolist()


def test_split_gives_views() -> None:
    x = torch.arange(6)
    split({"x": x}, 2)[1].batch["x"].fill_(-1)
    assert x.tolist() == [0, 1, 2, -1, -1, -1]


def test_split_keeps_container_types() -> None:
    batch = Frozen(OrderedDict(a=torch.arange(4)), Named(torch.arange(4), "note"))
    shard = split(batch, 2)[0].batch
    assert isinstance(shard, Frozen)
    assert isinstance(shard.x, OrderedDict)
    assert isinstance(shard.note, Named)
    assert shard.note.y == "note"
    assert shard.x["a"].tolist() == [0, 1]


def test_split_hands_on_what_has_no_first_dimension() -> None:
    thing = object()
    batch = (torch.arange(4), torch.tensor(3.0), None, 5, thing)
    for shard in split(batch, 2):
        assert shard.batch[1].item() == 3
        assert shard.batch[2:] == (None, 5, thing)


def test_split_of_a_small_batch_makes_fewer_shards() -> None:
    assert [shard.size for shard in split(torch.arange(2), 4)] == [1, 1]
    assert [shard.size for shard in split(torch.arange(5), 4, least=2)] == [3, 2]
    assert [shard.size for shard in split(torch.arange(1), 4, least=2)] == [1]
    assert [shard.size for shard in split(torch.empty(0, 2), 4)] == [0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"a": torch.zeros(4), "b": [torch.zeros(3, 4)]},
            r"`batch\['a'\]` has 4 samples .*\['b'\]\[0\]` has 3",
        ),
        ({"a": 1, "b": "text"}, r"it has no tensor \(a `dict`\)"),
        (torch.tensor(1.0), "it has no tensor"),
        (
            [pack_padded_sequence(torch.zeros(3, 2, 1), [3, 1])],
            r"`batch\[0\]` is a `PackedSequence`",
        ),
    ],
)
def test_split_refuses_what_it_would_have_to_guess(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(batch, 2)


def test_join_averages_scalars_by_size() -> None:
    outputs = [{"t": torch.tensor(1.0), "n": 2.0}] * 3
    outputs[2] = {"t": torch.tensor(4.0), "n": 5.0}
    joined = join(outputs, [1, 1, 4], CPU)
    assert joined["t"].item() == pytest.approx(3)
    assert joined["n"] == pytest.approx(4)


def test_join_adds_up_whole_numbers_and_goes_on_where_they_agree(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = JoinMemory()
    for _ in range(2):
        assert join([{"n": 3}, {"n": 4}], [4, 4], CPU, memory)
    assert [r.message.partition(" ")[0] for r in caplog.records] == ["`output['n']`"]
    assert join([{"n": 3}, {"n": 3}], [4, 4], CPU, memory) == {"n": 6}
    added = join([torch.tensor(1), torch.tensor(4)], [4, 4], CPU)
    assert (added.item(), added.dtype) == (5, torch.int64)


def test_join_puts_per_sample_lists_one_after_another() -> None:
    outputs = [[{"box": torch.zeros(i, 4)} for i in range(2)], [{"box": torch.zeros(7, 4)}]]
    joined = join(outputs, [2, 1], CPU)
    assert [len(entry["box"]) for entry in joined] == [0, 1, 7]


def test_join_takes_lists_of_different_things_for_columns() -> None:
    outputs = [[torch.zeros(2), {"a": torch.zeros(2)}], [torch.ones(2), {"a": torch.ones(2)}]]
    joined = join(outputs, [2, 2], CPU)
    assert joined[0].tolist() == joined[1]["a"].tolist() == [0, 0, 1, 1]


def test_join_joins_columns_of_a_list() -> None:
    outputs = [[torch.zeros(2, 3), torch.zeros(2)], [torch.ones(2, 3), torch.ones(2)]]
    joined = join(outputs, [2, 2], CPU)
    assert [tuple(column.shape) for column in joined] == [(4, 3), (4,)]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "`output` has .*'a'.*'b'"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"`output` has shapes \(2, 3\) and \(2, 4\)"),
        ([{"a": torch.zeros(2)}, {"a": "text"}], r"`output\['a'\]` is Tensor and str"),
    ],
)
def test_join_refuses_what_does_not_fit(outputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(outputs, [2, 2], CPU)


def test_lists_stay_what_they_were_in_earlier_batches() -> None:
    layout = BatchLayout()

    def lengths(*boxes: int) -> list[list[int]]:
        batch = {"x": torch.zeros(4, 1), "boxes": [torch.zeros(n, 4) for n in boxes]}
        return [[len(b) for b in shard.batch["boxes"]] for shard in split(batch, 2, 1, layout)]

    assert lengths(1, 2, 0, 3) == [[1, 2], [0, 3]]
    assert lengths(4, 4, 4, 4) == [[4, 4], [4, 4]]  # which could be four columns
    with pytest.raises(ValueError, match=r"`batch\['x'\]` has 4 .* `batch\['boxes'\]` has 3"):
        lengths(1, 2, 3)


def test_columns_stay_columns_where_a_batch_has_as_many_samples() -> None:
    layout = BatchLayout()
    for size in (5, 2, 3):
        batch = (torch.zeros(size), [torch.zeros(size, 1)] * 3)
        shards = split(batch, 2, 1, layout)
        assert all(len(shard.batch[1]) == 3 for shard in shards)


def test_lists_of_another_length_stay_whole() -> None:
    layout = BatchLayout()
    for size in (3, 2):
        shards = split({"x": torch.zeros(size), "names": ["a", "b"]}, 2, 1, layout)
        assert all(shard.batch["names"] == ["a", "b"] for shard in shards)


def test_numbers_of_samples_are_told() -> None:
    layout = BatchLayout()
    split({"x": torch.zeros(3), "n": 3, "epoch": 4, "last": True}, 2, 1, layout)
    assert layout.doubts == ["`batch['n']` is 3, as many as there are samples"]


@pytest.mark.parametrize(
    ("batch", "hint", "expected"),
    [
        ([torch.zeros(3, 8, 8)] * 5, Hint(frozenset({5})), 5),
        ([torch.zeros(3, 8, i) for i in range(5)], Hint(frozenset({5})), 5),
        ([torch.zeros(3, 8, 8)] * 5, Hint(frozenset({3})), 3),
        ([{"x": torch.zeros(i), "y": i} for i in range(4)], Hint(frozenset({8, 4})), 4),
        ([torch.zeros(1, 3), torch.zeros(1)], Hint(frozenset({2})), 1),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], Hint(frozenset({2})), 2),
        ((tuple(torch.zeros(3, 8, i) for i in range(4)), ({"b": torch.zeros(2)},) * 4), Hint(), 4),
        ([torch.zeros(2, 3), [("a", "b"), ("c", "d")]], Hint(frozenset({2}), True), 2),
        (["a", "b", "c"], Hint(), 3),
    ],
)
def test_number_of_samples_by_what_the_loader_tells(batch: Any, hint: Hint, expected: int) -> None:
    assert BatchLayout(lambda: hint).read(batch) == expected


def test_collation_of_torch_leaves_columns_of_texts() -> None:
    batch = [torch.zeros(2, 3), [("a", "b"), ("c", "d")]]
    shards = split(batch, 2, 1, BatchLayout(lambda: Hint(collated=True)))
    assert shards[0].batch[1] == [("a",), ("c",)]
    with pytest.raises(ValueError, match="an entry per sample, or an array per input"):
        split(batch, 2)


def test_scatter_and_gather_along_another_dimension() -> None:
    x, y = torch.arange(12.0).view(3, 4), torch.arange(4)
    shards = scatter((x, y), 2, dim=1)
    assert [tuple(shard.batch[0].shape) for shard in shards] == [(3, 2), (3, 2)]
    joined = gather([shard.batch for shard in shards], [2, 2], dim=1)
    assert torch.equal(joined[0], x)
    assert torch.equal(joined[1], y)
    named = scatter({"tokens": x, "mask": x.T}, 2, dim={"tokens": 1})
    assert tuple(named[0].batch["tokens"].shape) == (3, 2)
    assert tuple(named[0].batch["mask"].shape) == (2, 3)


def test_what_weighs_nothing_does_not_count() -> None:
    mean = weighted_mean([torch.tensor(float("nan")), torch.tensor(2.0)], [0, 3])
    assert mean.item() == 2


@dataclasses.dataclass
class Scaled:
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.x = self.x / 2
        self.n = len(self.x)


def test_records_that_cannot_be_made_again_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch` is a `Scaled` that computes values"):
        split(Scaled(torch.ones(4)), 2)


def test_caches_of_layers_are_joined_by_layer() -> None:
    class Cache:
        def __init__(self, keys: list[torch.Tensor]) -> None:
            self.keys, self.seen = keys, 5

    caches = [Cache([torch.full((3, 1), float(i))] * 3) for i in range(2)]
    joined = join(caches, [3, 3], CPU)
    assert [key.flatten().tolist() for key in joined.keys] == [[0, 0, 0, 1, 1, 1]] * 3
    assert joined.seen == 5
    assert len(caches[0].keys[0]) == 3


def test_dimension_of_outputs_is_remembered() -> None:
    memory = JoinMemory()
    for sizes in ([4, 3], [2, 2]):  # two layers, and two samples a shard
        states = [torch.full((2, n, 5), float(n)) for n in sizes]
        assert tuple(join(states, sizes, CPU, memory).shape) == (2, sum(sizes), 5)


def test_sequence_first_batches_are_told() -> None:
    layout = BatchLayout(lambda: Hint(frozenset({8})))
    split(torch.zeros(12, 8, 3), 2, 1, layout)
    assert "split along its first dimension" in layout.doubts[0]
    layout = BatchLayout(lambda: Hint(frozenset({8})))
    split(torch.zeros(8, 12, 3), 2, 1, layout)
    assert layout.doubts == []
