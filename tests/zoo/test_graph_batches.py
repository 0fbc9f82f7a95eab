"""Batches of graphs are split into those that collating the graphs of a part would have made."""

from typing import Any

import pytest
import torch

from lightning_mgpu.engine.batch.graphs import graph_count, is_graph_batch, join_graphs, take_graphs

data = pytest.importorskip("torch_geometric.data", reason="needs the extra `zoo`")


def _graph(index: int) -> Any:
    generator = torch.Generator().manual_seed(index)
    nodes = 3 + index % 4
    return data.Data(
        x=torch.randn(nodes, 4, generator=generator),
        edge_index=torch.randint(0, nodes, (2, 2 * nodes + 1), generator=generator),
        y=torch.tensor([index % 3]),
        weight=0.5 * index,
        name=f"graph {index}",
    )


def _hetero(index: int) -> Any:
    generator = torch.Generator().manual_seed(index)
    graph = data.HeteroData()
    graph["paper"].x = torch.randn(3 + index, 2, generator=generator)
    graph["author"].num_nodes = 2 + index
    ends = [torch.randint(0, n, (5,), generator=generator) for n in (3 + index, 2 + index)]
    graph["paper", "of", "author"].edge_index = torch.stack(ends)
    graph.y = torch.tensor([index])
    return graph


def _nested(index: int) -> Any:
    graph = _graph(index)
    graph.views = {"left": torch.randn(index + 1, 2), "right": torch.randn(1, 3)}
    return graph


class _Pair(data.Data):
    """Two graphs as one sample, whose numbers of nodes start separately."""

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        if key == "edge_index_s":
            return self.x_s.size(0)
        return super().__inc__(key, value, *args, **kwargs)


def _pair(index: int) -> Any:
    edges = torch.randint(0, 2 + index, (2, 4), generator=torch.Generator().manual_seed(index))
    return _Pair(
        x_s=torch.randn(2 + index, 2), edge_index_s=edges, num_nodes=2 + index, whole=torch.ones(3)
    )


def _assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            _assert_same(actual[key], value)
    else:
        assert actual == expected


@pytest.mark.parametrize("make", [_graph, _hetero, _nested, _pair])
@pytest.mark.parametrize("follow", [None, ["x"], ["x_s", "y"]])
def test_part_is_that_of_collation(make: Any, follow: Any) -> None:
    graphs = [make(index) for index in range(6)]
    batch = data.Batch.from_data_list(graphs, follow_batch=follow)
    before = batch.to_dict()
    assert is_graph_batch(batch)
    assert graph_count(batch) == 6
    for start, stop in ((0, 2), (2, 6), (3, 4), (0, 6)):
        part = take_graphs(batch, start, stop)
        expected = data.Batch.from_data_list(graphs[start:stop], follow_batch=follow)
        _assert_same(part.to_dict(), expected.to_dict())
        assert type(part) is type(batch)
        assert part.num_graphs == stop - start
        # A part of a part: micro-batches of a shard.
        again = take_graphs(part, 0, 1).to_dict()
        _assert_same(again, take_graphs(batch, start, start + 1).to_dict())
    _assert_same(batch.to_dict(), before)


@pytest.mark.parametrize("make", [_graph, _nested, _pair])
def test_part_gives_its_graphs_back(make: Any) -> None:
    graphs = [make(index) for index in range(5)]
    part = take_graphs(data.Batch.from_data_list(graphs), 1, 4)
    for graph, expected in zip(part.to_data_list(), graphs[1:4], strict=True):
        for name in ("edge_index", "edge_index_s", "x", "y"):
            if name in expected:
                _assert_same(graph[name], expected[name])


@pytest.mark.parametrize("make", [_graph, _nested, _pair])
def test_parts_join_to_the_batch(make: Any) -> None:
    batch = data.Batch.from_data_list([make(index) for index in range(5)])
    batch.scores = torch.randn(5, 2)
    parts = [take_graphs(batch, 0, 2), take_graphs(batch, 2, 3), take_graphs(batch, 3, 5)]
    _assert_same(join_graphs(parts).to_dict(), batch.to_dict())


def test_attributes_set_after_collation_are_split_by_their_length() -> None:
    batch = data.Batch.from_data_list([_graph(index) for index in range(5)])
    batch.position = torch.arange(batch.num_nodes)
    batch.edge_weight = torch.arange(batch.num_edges)
    batch.target = torch.arange(5)
    batch.ids = ["a", "b", "c", "d", "e"]
    batch.temperature = 0.3
    part = take_graphs(batch, 2, 4)
    nodes = (batch.batch >= 2) & (batch.batch < 4)
    edges = nodes[batch.edge_index[0]]
    _assert_same(part.position, batch.position[nodes])
    _assert_same(part.edge_weight, batch.edge_weight[edges])
    _assert_same(part.target, torch.tensor([2, 3]))
    assert part.ids == ["c", "d"]
    assert part.temperature == 0.3


def test_values_changed_after_collation_are_the_new_ones() -> None:
    batch = data.Batch.from_data_list([_graph(index) for index in range(4)])
    batch.x = batch.x.double() * 2
    _assert_same(take_graphs(batch, 1, 3).x, batch.x[(batch.batch == 1) | (batch.batch == 2)])


def _more_edges(batch: Any) -> None:
    batch.edge_index = torch.cat([batch.edge_index, batch.edge_index.flip(0)], 1)


def _other_order(batch: Any) -> None:
    batch.edge_index = batch.edge_index.flip(1)


def _unknown_length(batch: Any) -> None:
    batch.mask = torch.ones(1, dtype=torch.bool)


def _node_numbers(batch: Any) -> None:
    batch.root_index = batch.ptr[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_more_edges, r"`edge_index` of the batch of graphs has 112 entries, but .* have 56"),
        (_other_order, r"`edge_index` .* no longer has its edges in the order of the graphs"),
        (_unknown_length, r"`mask` of length 1 .* \(none fits\)"),
        (_node_numbers, r"`root_index` of length 6 .* \(graphs fits\)"),
        (lambda batch: setattr(batch, "pairs", {"a": 1}), "`pairs` of the batch of graphs has no"),
        (lambda batch: delattr(batch, "_slice_dict"), "not made by `Batch.from_data_list`"),
    ],
)
def test_what_cannot_be_told_apart_is_an_error(change: Any, message: str) -> None:
    batch = data.Batch.from_data_list([_graph(index) for index in range(6)])
    change(batch)
    with pytest.raises(ValueError, match=message) as caught:
        take_graphs(batch, 0, 2)
    assert "scatter_fn" in str(caught.value)


def test_one_graph_and_other_objects_are_no_batch_of_graphs() -> None:
    for other in (_graph(0), _hetero(0), torch.ones(2), [_graph(0)], {"x": 1}, data.Batch):
        assert not is_graph_batch(other)
