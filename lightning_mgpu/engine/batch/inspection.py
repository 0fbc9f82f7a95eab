"""Look at the parts of a batch: where they are, how long, and whether they can be cut."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch.containers import (
    has_rows,
    holds_tensors,
    is_array,
    is_sequence,
    parts,
)
from lightning_mgpu.engine.batch.graphs import is_graph_batch, take_graphs


def cut_rows(value: Any, dim: int, start: int, stop: int) -> Any:
    """Entries `start` to `stop` along a dimension, a view; of graphs, those graphs."""
    if is_graph_batch(value):
        return take_graphs(value, start, stop)
    return value[(slice(None),) * dim + (slice(start, stop),)] if dim else value[start:stop]


def signature(value: Any) -> Any:
    """Structure that entries of one kind share: types, keys, numbers of dimensions and dtypes."""
    if isinstance(value, Tensor) or is_array(value):
        return type(value), len(value.shape), getattr(value, "dtype", None)
    if isinstance(value, Mapping):
        return type(value), tuple((key, signature(part)) for key, part in value.items())
    if is_sequence(value):
        return type(value), frozenset(signature(part) for part in value)
    return type(value), tuple(signature(part) for _, part in parts(value))


def parts_below(value: Any, top: Any) -> Iterator[tuple[str, Any, Any]]:
    """The parts of a container: how to get there, the part, and the batch's part that it is in."""
    found = parts(value)
    if top is not None or not found:
        yield from ((name, part, top) for name, part in found)
        return
    keys: Any = value if isinstance(value, Mapping) else range(len(found))
    yield from ((name, part, key) for key, (name, part) in zip(keys, found, strict=True))


def may_be_samples(value: Any, size: int) -> bool:
    """Return whether a list may have one entry for each of `size` samples, all of one kind."""
    if len(value) != size:
        return False
    arrays = [entry for entry in value if is_array(entry)]
    dtypes = {entry.dtype for entry in arrays if hasattr(entry, "dtype") and 0 not in entry.shape}
    return len({len(entry.shape) for entry in arrays}) <= 1 and len(dtypes) <= 1


def lengths_of_outermost(value: Any) -> Iterator[int]:
    """Lengths of the lists that are in no other list."""
    if is_sequence(value):
        yield len(value)
        return
    for _, part in parts(value):
        yield from lengths_of_outermost(part)


def lengths_of_sequences(value: Any) -> Iterator[int]:
    """Lengths of all lists that are not empty, the innermost first."""
    for _, part in parts(value):
        yield from lengths_of_sequences(part)
    if is_sequence(value) and value:
        yield len(value)


def check_leaf(value: Any, path: str) -> None:
    """Refuse values that have samples but cannot be split by sample.

    Raises:
        ValueError: Names the place, and what else to use if there is a way.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise ValueError(f"`{path}` is a {layout} tensor, which torch cannot slice.")
    elif isinstance(value, PackedSequence):
        raise ValueError(f"`{path}` is a `PackedSequence`, whose samples are interleaved.")
    elif isinstance(value, Iterator):
        raise ValueError(
            f"`{path}` is a `{type(value).__name__}`, which can be read only once. Make it a list."
        )
    elif not has_rows(value) and holds_tensors(value):
        raise ValueError(
            f"`{path}` is a `{type(value).__name__}` that holds tensors in an unknown layout."
            " Make it a dataclass, or a dict of tensors."
        )
