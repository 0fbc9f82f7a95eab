"""Predictions of several ranks, brought together by themselves."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lightning_mgpu.strategies.ranks.predictions import (
    RankPredictions,
    join_batches,
    merge_predictions,
)
from lightning_mgpu.strategies.ranks.sample_dealing import LoaderOrder, chunks

# Two ranks, five samples, batches of two: as a distributed sampler deals them.
PLACES = [[[0, 2], [4]], [[1, 3]]]


class Pair(NamedTuple):
    x: Any
    y: Any


def _merge(
    make: Any,
    places: list[list[list[int]]] = PLACES,
    known_by: Any = "position",
    sizes: list[int] | None = None,
) -> Any:
    ranks = [
        RankPredictions(
            [[make(batch) for batch in rank]],
            [LoaderOrder(known_by, rank, chunks(5, 2) if sizes is None else sizes)],
            nested=False,
        )
        for rank in places
    ]
    return merge_predictions(ranks)


def _column(batch: list[int]) -> torch.Tensor:
    return torch.tensor(batch)


def _plain(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: _plain(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [_plain(value) for value in output]
    return output.tolist() if isinstance(output, (torch.Tensor, np.ndarray)) else output


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_column, [[0, 1], [2, 3], [4]]),
        (np.array, [[0, 1], [2, 3], [4]]),
        (
            lambda b: {"a": _column(b), "b": None},
            [{"a": i, "b": None} for i in ([0, 1], [2, 3], [4])],
        ),
        (lambda b: (_column(b), -_column(b)), [[[0, 1], [0, -1]], [[2, 3], [-2, -3]], [[4], [-4]]]),
        (lambda b: Pair(_column(b), _column(b)), [[i, i] for i in ([0, 1], [2, 3], [4])]),
        (lambda b: [str(i) for i in b], [["0", "1"], ["2", "3"], ["4"]]),
        (lambda b: tuple(str(i) for i in b), [["0", "1"], ["2", "3"], ["4"]]),
        (
            lambda b: (_column(b), tuple(str(i) for i in b)),
            [[[0, 1], ["0", "1"]], [[2, 3], ["2", "3"]], [[4], ["4"]]],
        ),
        (lambda b: [torch.full((i,), i) for i in b], [[[], [1]], [[2, 2], [3, 3, 3]], [[4] * 4]]),
    ],
    ids=[
        *("tensor", "array", "dict", "tuple", "named tuple", "texts", "tuple of texts"),
        *("texts in a tuple", "boxes"),
    ],
)
def test_samples_come_in_the_order_of_the_sampler(
    make: Any, expected: Any, recwarn: pytest.WarningsRecorder
) -> None:
    merged = _merge(make)
    assert [_plain(batch) for batch in merged] == expected
    assert not recwarn


def test_texts_keep_their_container() -> None:
    assert type(_merge(lambda b: tuple(map(str, b)))[0]) is tuple
    assert type(_merge(lambda b: list(map(str, b)))[0]) is list


def test_two_numbers_for_each_batch_of_two_are_not_two_samples() -> None:
    with pytest.warns(UserWarning, match="cannot be split by sample"):
        merged = _merge(lambda b: (0.5, float(len(b))), [[[0, 2]], [[1, 3]]])
    assert merged == [(0.5, 2.0), (0.5, 2.0)]


def test_named_tuples_keep_their_type() -> None:
    assert type(_merge(lambda b: Pair(_column(b), _column(b)))[0]) is Pair


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda b: torch.zeros(len(b), max(b)), [(2, 2), (2, 3), (1, 4)]),
        (lambda b: torch.tensor(1.0), [(), (), ()]),
    ],
    ids=["padded to the batch", "scalar"],
)
def test_outputs_that_cannot_be_taken_apart_come_batch_by_batch(make: Any, expected: Any) -> None:
    with pytest.warns(UserWarning, match="cannot be split by sample"):
        merged = _merge(make)
    assert [tuple(batch.shape) for batch in merged] == expected


def test_outputs_of_differing_structure_come_batch_by_batch() -> None:
    with pytest.warns(UserWarning, match="cannot be split by sample"):
        merged = _merge(lambda b: {"a": _column(b)} if 0 in b else None)
    assert [_plain(batch) for batch in merged] == [{"a": [0, 2]}, None, None]


def test_padding_is_dropped() -> None:
    merged = _merge(_column, [[[0, 2], [4]], [[1, 3], [5]]])
    assert [_plain(batch) for batch in merged] == [[0, 1], [2, 3], [4]]


def test_batch_of_nothing_but_padding_is_dropped_also_where_it_cannot_be_taken_apart() -> None:
    with pytest.warns(UserWarning, match="cannot be split by sample"):
        merged = _merge(lambda b: torch.tensor(b[0]), [[[0, 2], [4]], [[1, 3], [5]]])
    assert _plain(merged) == [0, 1, 4]


def test_batches_have_the_sizes_of_one_process() -> None:
    merged = _merge(_column, sizes=[1, 3, 1])
    assert [_plain(batch) for batch in merged] == [[0], [1, 2, 3], [4]]


def test_whole_batches_need_not_be_taken_apart(recwarn: pytest.WarningsRecorder) -> None:
    merged = _merge(lambda b: f"{b}", [[[0, 1], [4]], [[2, 3]]])
    assert merged == ["[0, 1]", "[2, 3]", "[4]"]
    assert not recwarn


def test_batches_that_a_limit_left_out_are_missing_at_the_end() -> None:
    merged = _merge(_column, [[[0, 2]], [[1, 3]]], sizes=[2, 2, 2, 2])
    assert [_plain(batch) for batch in merged] == [[0, 1], [2, 3]]


def test_unknown_dealing_comes_in_the_order_of_the_dataset(
    recwarn: pytest.WarningsRecorder,
) -> None:
    merged = _merge(_column, [[[7, 1], [3]], [[0, 5]]], "dataset")
    assert [_plain(batch) for batch in merged] == [[0, 1], [3, 5], [7]]
    assert not recwarn


def test_repetitions_of_unknown_dealing_are_kept_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="padding cannot be distinguished from repetition"):
        merged = _merge(_column, [[[0, 2], [4]], [[1, 3], [0]]], "dataset")
    assert [_plain(batch) for batch in merged] == [[0, 0], [1, 2], [3, 4]]


def test_ranks_that_saw_everything_count_once() -> None:
    everything = [[[0, 1], [2]]] * 2
    for known_by in ("dataset", "everything"):
        assert [_plain(b) for b in _merge(_column, everything, known_by)] == [[0, 1], [2]]


def test_batches_of_an_unknown_order_come_in_turns() -> None:
    assert [_plain(b) for b in _merge(_column, known_by="nothing")] == [[0, 2], [1, 3], [4]]


def test_predictions_that_nobody_kept_are_none() -> None:
    assert merge_predictions([RankPredictions(None, [], False)] * 2) is None


def test_batches_of_one_process_are_joined() -> None:
    batches = [{"p": torch.ones(2, 3), "t": ["a", "b"]}, {"p": torch.ones(1, 3), "t": ["c"]}]
    joined = join_batches(batches)
    assert joined["p"].shape == (3, 3)
    assert joined["t"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "batches",
    [[], [torch.tensor(1.0)], [torch.ones(2, 3), torch.ones(2, 4)], ["text"]],
    ids=["none", "scalars", "padded", "texts"],
)
def test_batches_that_do_not_fit_together_stay_a_list(batches: list[Any]) -> None:
    assert join_batches(batches) == batches or len(join_batches(batches)) == len(batches)
    assert isinstance(join_batches(batches), list)
