"""Batches taken apart and put together."""

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_mgpu.engine.batch import batch_size, join, map_leaves, split

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
            # (A list of as many dicts as samples is taken for one with a dict per sample.)
            st.lists(inner.filter(lambda v: not isinstance(v, dict)), min_size=1, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
            st.builds(Named, inner, inner),
            st.builds(Frozen, inner, inner),
        ),
        max_leaves=6,
    )


@st.composite
def _batches(draw: st.DrawFn) -> tuple[Any, int]:
    size = draw(st.integers(1, 9))
    leaves = (
        torch.arange(size),
        torch.arange(3.0 * size).reshape(size, 3),
        np.arange(2 * size).reshape(size, 2),
    )
    skeleton = draw(_nested(st.integers(0, 2)))
    return [torch.arange(size), map_leaves(leaves.__getitem__, skeleton)], size


def _equal(a: Any, b: Any) -> bool:
    leaves: list[Any] = []
    map_leaves(leaves.append, a)
    others: list[Any] = []
    map_leaves(others.append, b)
    return len(leaves) == len(others) and all(
        type(x) is type(y) and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(leaves, others, strict=True)
    )


@given(_batches(), st.integers(1, 5))
def test_joined_shards_are_the_batch(batch_and_size: tuple[Any, int], count: int) -> None:
    batch, size = batch_and_size
    shards = split(batch, count)
    sizes = [shard.size for shard in shards]
    assert sum(sizes) == size
    assert len(shards) == min(count, size)
    assert max(sizes) - min(sizes) <= 1
    assert all(batch_size(shard.batch) == shard.size for shard in shards)
    joined = join([shard.batch for shard in shards], sizes, CPU)
    assert type(joined) is type(batch)
    assert _equal(joined, batch)


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


def test_split_takes_lists_of_plain_values_apart_if_they_have_one_per_sample() -> None:
    batch = {"x": torch.arange(4), "names": list("abcd"), "classes": ["cat", "dog"]}
    first, second = split(batch, 2)
    assert (first.batch["names"], second.batch["names"]) == (["a", "b"], ["c", "d"])
    assert first.batch["classes"] == second.batch["classes"] == ["cat", "dog"]


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
            r"`batch\['a'\]` has 4.*\['b'\]\[0\]`.*3",
        ),
        ({"a": 1, "b": "text"}, r"there is no tensor in it \(a `dict`\)"),
        (torch.tensor(1.0), "there is no tensor in it"),
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
    outputs = [{"t": torch.tensor(1.0), "n": 2, "i": torch.tensor(1)}] * 3
    outputs[2] = {"t": torch.tensor(4.0), "n": 5.0, "i": torch.tensor(4)}
    joined = join(outputs, [1, 1, 4], CPU)
    assert joined["t"].item() == pytest.approx(3)
    assert joined["n"] == pytest.approx(4)
    assert joined["i"].item() == 3
    assert joined["i"].dtype == torch.int64


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
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"`output` has shapes \[\(2, 3\), \(2, 4\)\]"),
        ([{"a": torch.zeros(2)}, {"a": "text"}], r"`output\['a'\]` is Tensor and str"),
    ],
)
def test_join_refuses_what_does_not_fit(outputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(outputs, [2, 2], CPU)
