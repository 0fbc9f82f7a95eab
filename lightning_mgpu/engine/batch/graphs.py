"""Split a `torch_geometric.data.Batch` by graphs, and join such batches.

Recognised by its methods, so that `torch_geometric` need not be installed.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What collation makes itself: numbers of graphs for each node, and of nodes.
_MADE = frozenset({"batch", "ptr", "num_nodes"})
_ADVICE = (
    "Set it on the graphs before they are collated or in `on_after_batch_transfer`, which gets each"
    " shard; or give the strategy a `scatter_fn`."
)


def is_graph_batch(value: Any) -> bool:
    """Return whether `value` is a `torch_geometric.data.Batch` of graphs, not a single graph."""
    kind = type(value)
    names = ("to_data_list", "from_data_list", "get_example", "num_graphs")
    return all(hasattr(kind, name) for name in names)


def graph_count(batch: Any) -> int:
    """Number of graphs in a batch of graphs."""
    return int(batch.num_graphs)


def tensors_of_graphs(batch: Any) -> list[Tensor]:
    """All tensors of a batch of graphs."""
    return [value for value in attributes_of_graphs(batch) if isinstance(value, Tensor)]


def attributes_of_graphs(batch: Any) -> list[Any]:
    """All attributes of a batch of graphs."""
    return [value for store in batch.stores for value in dict(store).values()]


def take_graphs(batch: Any, start: int, stop: int) -> Any:
    """Take the graphs from `start` to `stop` as a batch whose nodes and graphs count from zero.

    Attributes that were set on the batch after its collation are split by nodes, edges or graphs,
    as their length tells.

    Args:
        batch: From `Batch.from_data_list` (PyG's DataLoader), of homogeneous or other graphs.
        start: First graph.
        stop: Graph after the last.

    Returns:
        As collating these graphs alone would make it; its tensors are views where they can be.

    Raises:
        ValueError: It is not known which part of an attribute belongs to which graph.
    """
    if not hasattr(batch, "_slice_dict"):
        raise ValueError(
            f"a `{type(batch).__name__}` that was not made by `Batch.from_data_list` cannot be"
            " split into its graphs: collate a list of graphs (as PyG's DataLoader does), or give"
            " the strategy a `scatter_fn`."
        )
    for store, slices, _ in _stores(batch):
        _check_lengths(batch, store, slices)
    taken = _narrowed(batch, start, stop)
    if taken is None:
        graphs = [batch.get_example(index) for index in range(start, stop)]
        taken = _collated(batch, graphs)
    for (store, slices, _), (new, _, _) in zip(_stores(batch), _stores(taken), strict=True):
        _check_edges(new)
        for name in _added(store, slices):
            new[name] = _part(batch, store, slices, name, start, stop)
    return taken


def join_graphs(batches: Sequence[Any]) -> Any:
    """Batch the graphs of several batches as one, in their order."""
    first = batches[0]
    joined = _collated(first, [graph for batch in batches for graph in batch.to_data_list()])
    stores = zip(*(_stores(batch) for batch in batches), strict=True)
    for (new, _, _), parts in zip(_stores(joined), stores, strict=True):
        for name in _added(parts[0][0], parts[0][1]):
            new[name] = _joined(first, [store[name] for store, _, _ in parts], name, new)
    return joined


def _stores(batch: Any) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Attributes of each kind of node and edge; where each graph's lie; what was added to them."""
    for store in batch.stores:
        key = store._key
        if key is None:
            yield store, batch._slice_dict, batch._inc_dict
        else:
            yield store, batch._slice_dict.get(key, {}), batch._inc_dict.get(key, {})


def _collated(batch: Any, graphs: list[Any]) -> Any:
    # The class from before PyG mixed in that of the graphs (`DataBatch` is a `Batch` and a `Data`).
    kind: Any = type(batch).__bases__[0]
    followed = [name for store, slices, _ in _stores(batch) for name in _followed(store, slices)]
    return kind.from_data_list(graphs, follow_batch=followed)


def _followed(store: Any, slices: dict[str, Any]) -> list[str]:
    """Names in `follow_batch` at collation, which left `x_batch` and `x_ptr` beside `x`."""
    return [
        name
        for name in slices
        if f"{name}_batch" in store and f"{name}_ptr" in store and f"{name}_batch" not in slices
    ]


def _narrowed(batch: Any, start: int, stop: int) -> Any:
    """Cut the collated tensors, which is faster than collating anew; None where that is needed."""
    taken = copy.copy(batch)
    taken._slice_dict, taken._inc_dict, taken._num_graphs = {}, {}, stop - start
    for (store, slices, incs), new in zip(_stores(batch), taken.stores, strict=True):
        new_slices, new_incs = taken._slice_dict, taken._inc_dict
        if store._key is not None and slices:
            new_slices = taken._slice_dict.setdefault(store._key, {})
            new_incs = taken._inc_dict.setdefault(store._key, {})
        for name in _added(store, slices):
            del new[name]
        for name in [name for name in slices if name in store]:
            dim = batch.__cat_dim__(name, store[name], store) or 0
            cut = _cut(store[name], slices[name], incs[name], dim, start, stop)
            if cut is None:
                return None
            new[name], new_slices[name], new_incs[name] = cut
        _renumber(store, new, _followed(store, slices), start, stop)
    return taken


def _cut(value: Any, bounds: Any, incs: Any, dim: Any, start: int, stop: int) -> Any:
    """Cut one attribute, its bounds and increments; None if it is of a kind that PyG has to cut."""
    if type(bounds) is not Tensor or bounds.dim() != 1 or not isinstance(dim, int):
        return None
    low, high = int(bounds[start]), int(bounds[stop])
    if type(value) is Tensor and value.layout == torch.strided:
        part: Any = value.narrow(dim, low, high - low)
        if incs is not None:
            part = part - incs[start].to(part.device) if bool(incs[start].any()) else part
            incs = incs[start:stop] - incs[start]
    elif type(value) is list:
        part = value[low:high]
    else:
        return None
    return part, bounds[start : stop + 1] - low, incs


def _renumber(store: Any, new: Any, followed: list[str], start: int, stop: int) -> None:
    """Let numbers of graphs and nodes in the new part begin at zero."""
    for name in ("", *(f"{name}_" for name in followed)):
        pointers = store.get(f"{name}ptr")
        if type(pointers) is Tensor:
            low, high = int(pointers[start]), int(pointers[stop])
            new[f"{name}ptr"] = pointers[start : stop + 1] - low
            new[f"{name}batch"] = store[f"{name}batch"][low:high] - start
    if "_num_nodes" in store.__dict__:
        counts = store._num_nodes[start:stop]
        new.__dict__["_num_nodes"], new["num_nodes"] = counts, sum(counts)


def _added(store: Any, slices: dict[str, Any]) -> list[str]:
    """Names of what was set after collation."""
    made = {f"{name}_{end}" for name in slices for end in ("batch", "ptr")}
    return [name for name in store if name not in slices.keys() | made | _MADE]


def _check_lengths(batch: Any, store: Any, slices: dict[str, Any]) -> None:
    """Refuse attributes that have gained or lost rows since collation."""
    for name, bounds in slices.items():
        value = store.get(name)
        if type(value) is not Tensor or value.layout != torch.strided:
            continue
        length = value.size(batch.__cat_dim__(name, value, store) or 0)
        if isinstance(bounds, Tensor) and length != int(bounds[-1]):
            raise ValueError(
                f"`{name}` of the batch of graphs has {length} entries, but the graphs that were"
                f" collated have {int(bounds[-1])}. {_ADVICE}"
            )


def _check_edges(store: Any) -> None:
    """Refuse edges that have changed places since collation, and so have lost their graphs."""
    edges = store.get("edge_index")
    if not isinstance(edges, Tensor) or edges.numel() == 0:
        return
    for row, size in zip(edges, store.size(), strict=True):
        if size is not None and not 0 <= int(row.min()) <= int(row.max()) < size:
            raise ValueError(
                "`edge_index` of the batch of graphs no longer has its edges in the order of the"
                f" graphs that were collated. {_ADVICE}"
            )


def _part(batch: Any, store: Any, slices: dict[str, Any], name: str, start: int, stop: int) -> Any:
    """Take the graphs' part of an attribute that was set after collation."""
    value = store[name]
    if isinstance(value, Tensor) and value.dim() > 0:
        dim = batch.__cat_dim__(name, value, store) or 0
        bounds = _bounds(batch, store, slices, name, value.size(dim))
        return value.narrow(dim, int(bounds[start]), int(bounds[stop] - bounds[start]))
    if isinstance(value, (list, tuple)) and len(value) == batch.num_graphs:
        return value[start:stop]
    if isinstance(value, (list, tuple, Mapping)):
        raise ValueError(f"`{name}` of the batch of graphs has no entry per graph. {_ADVICE}")
    return value


def _bounds(batch: Any, store: Any, slices: dict[str, Any], name: str, length: int) -> Tensor:
    """Start of each graph's part, by nodes, edges or graphs, whichever has this length."""
    count = int(batch.num_graphs)
    levels = {
        "nodes": store.get("ptr"),
        "edges": slices.get("edge_index"),
        "graphs": torch.arange(count + 1),
    }
    fit = {
        level: bounds
        for level, bounds in levels.items()
        if isinstance(bounds, Tensor) and int(bounds[-1]) == length
    }
    # Among the names with "index" are numbers of nodes, which would have to be shifted.
    if len({tuple(bounds.tolist()) for bounds in fit.values()}) != 1 or "index" in name:
        raise ValueError(
            f"`{name}` of length {length} was set on a batch of {count} graphs, and it is not clear"
            f" which part belongs to which graph ({' or '.join(fit) or 'none'} fits). {_ADVICE}"
        )
    return next(iter(fit.values()))


def _joined(batch: Any, values: list[Any], name: str, store: Any) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.dim() > 0:
        return torch.cat(values, dim=batch.__cat_dim__(name, first, store) or 0)
    if isinstance(first, (list, tuple)):
        return type(first)(entry for value in values for entry in value)
    return first
