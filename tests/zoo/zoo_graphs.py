"""Graph networks: torch_geometric."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.nn import GAT, GCN, GIN, GraphNorm, HeteroConv, SAGEConv, global_mean_pool
from zoo import BATCH, STEPS, Case, Model

from lightning_mgpu import Shard, scatter

CLASSES = 3


class _PerGraph(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.convolutions = kind(4, 8, 2)
        self.normalisation = GraphNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, batch: Any) -> Tensor:
        nodes = self.convolutions(batch.x, batch.edge_index)
        nodes = self.normalisation(nodes, batch.batch, batch.num_graphs)
        return self.head(global_mean_pool(nodes, batch.batch, batch.num_graphs))


class ClassifiesGraphs(Model):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch), batch.y)

    def outputs(self, batch: Any) -> Any:
        return self.net(batch)

    def weight(self, batch: Any) -> int:
        return int(batch.num_graphs)


class LabelsBeside(ClassifiesGraphs):
    """`(graphs, labels)` as a batch."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def outputs(self, batch: Any) -> Any:
        return self.net(batch[0])

    def weight(self, batch: Any) -> int:
        return len(batch[1])


class ClassifiesNodes(Model):
    """A mean over nodes, of which each graph has another number."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch.x, batch.edge_index), batch.node_labels)

    def outputs(self, batch: Any) -> Any:
        return self.net(batch.x, batch.edge_index)

    def weight(self, batch: Any) -> int:
        return int(batch.num_nodes)


class ReturnsGraphs(ClassifiesGraphs):
    def outputs(self, batch: Any) -> Any:
        graphs = batch.clone()
        graphs.logits = self.net(batch)
        return graphs


class _PerHeteroGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        of = ("paper", "of", "author")
        self.convolution = HeteroConv({of: SAGEConv((4, 2), 8)})
        self.head = nn.Linear(8, CLASSES)

    def forward(self, batch: Any) -> Tensor:
        nodes = self.convolution(batch.x_dict, batch.edge_index_dict)["author"]
        return self.head(global_mean_pool(nodes, batch["author"].batch, batch.num_graphs))


def _graphs() -> list[Data]:
    generator = torch.Generator().manual_seed(7)
    graphs = []
    for i in range(BATCH * STEPS):
        nodes = 3 + i % 4
        graphs.append(
            Data(
                x=torch.randn(nodes, 4, generator=generator, dtype=torch.float64),
                edge_index=torch.randint(0, nodes, (2, 2 * nodes), generator=generator),
                y=torch.tensor([i % CLASSES]),
                node_labels=torch.randint(0, CLASSES, (nodes,), generator=generator),
            )
        )
    return graphs


def _hetero_graphs() -> list[HeteroData]:
    generator = torch.Generator().manual_seed(8)
    graphs = []
    for i in range(BATCH * STEPS):
        papers, authors = 3 + i % 4, 2 + i % 2
        graph = HeteroData()
        graph["paper"].x = torch.randn(papers, 4, generator=generator, dtype=torch.float64)
        graph["author"].x = torch.randn(authors, 2, generator=generator, dtype=torch.float64)
        ends = [torch.randint(0, n, (2 * papers,), generator=generator) for n in (papers, authors)]
        graph["paper", "of", "author"].edge_index = torch.stack(ends)
        graph.y = torch.tensor([i % CLASSES])
        graphs.append(graph)
    return graphs


def with_labels(samples: list[Any]) -> tuple[Any, Tensor]:
    graphs, labels = zip(*samples, strict=True)
    return Batch.from_data_list(list(graphs)), torch.stack(labels)


def by_nodes(batch: Any, count: int) -> list[Shard]:
    return [Shard(shard.batch, shard.batch.num_nodes) for shard in scatter(batch, count)]


def _per_graph(kind: Any, model: type[Model] = ClassifiesGraphs) -> Case:
    return Case(lambda: model(_PerGraph(kind)), _graphs(), Batch.from_data_list)


gcn = partial(_per_graph, GCN)
gat = partial(_per_graph, GAT, ReturnsGraphs)


def gin_with_labels() -> Case:
    samples = [(graph, graph.y[0]) for graph in _graphs()]
    return Case(lambda: LabelsBeside(_PerGraph(GIN)), samples, with_labels)


def hetero() -> Case:
    build = _PerHeteroGraph
    return Case(lambda: ClassifiesGraphs(build()), _hetero_graphs(), Batch.from_data_list)


def nodes() -> Case:
    return Case(
        lambda: ClassifiesNodes(GCN(4, 8, 2, CLASSES)),
        _graphs(),
        Batch.from_data_list,
        advice={"scatter_fn": by_nodes},
    )
