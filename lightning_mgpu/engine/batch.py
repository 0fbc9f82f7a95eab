"""Split a batch into shards, and put the shards' outputs together again.

A batch is any nesting of mappings, sequences, named tuples and dataclasses.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__: list[str] = []


class Shard(NamedTuple):
    """A part of a batch.

    Attributes:
        batch: Of the same structure as the whole.
        size: Number of samples; what the shard weighs in means.
    """

    batch: Any
    size: int


def split(batch: Any, count: int, least: int = 1) -> list[Shard]:
    """Split a batch along its first dimension into at most `count` shards, as even as can be.

    Tensors and arrays of at least one dimension are split along their first, which must be the
    same for all; so are lists of strings with one per sample. All else goes to every shard as it
    is.

    Args:
        batch: The whole batch.
        count: How many shards are wanted; a small batch makes fewer.
        least: The least samples in a shard, unless the whole batch has fewer.

    Returns:
        The shards in order; tensors are views.

    Raises:
        ValueError: There is no tensor to tell the size of the batch by, or two disagree.
    """
    size = batch_size(batch)
    if size == 0:
        return [Shard(batch, 0)]
    count = min(count, max(1, size // least))
    base, more = divmod(size, count)
    shards, start = [], 0
    for index in range(count):
        stop = start + base + (index < more)
        shards.append(Shard(_slice(batch, start, stop, size), stop - start))
        start = stop
    return shards


def batch_size(batch: Any) -> int:
    """The first dimension that all tensors of a batch share.

    Raises:
        ValueError: As for `split`.
    """
    first: tuple[str, int] | None = None
    for path, leaf in leaves(batch):
        if isinstance(leaf, PackedSequence):
            raise ValueError(f"`{path}` is a `PackedSequence`, whose samples do not lie in a row.")
        if not _is_array(leaf):
            continue
        if first is None:
            first = (path, leaf.shape[0])
        elif leaf.shape[0] != first[1]:
            raise ValueError(
                f"`{first[0]}` has {first[1]} samples (its first dimension), but `{path}` of shape"
                f" {tuple(leaf.shape)} has {leaf.shape[0]}."
            )
    if first is None:
        raise ValueError(f"there is no tensor in it (a `{type(batch).__name__}`).")
    return first[1]


def map_leaves(function: Callable[[Any], Any], batch: Any) -> Any:
    """The same structure with `function` applied to everything that is no container."""
    return _rebuild(batch, [map_leaves(function, part) for _, part in _parts(batch)], function)


def join(outputs: Sequence[Any], sizes: Sequence[int], device: torch.device) -> Any:
    """Put the shards' outputs together as one step on the whole batch would have returned them.

    Scalars (numbers and tensors without dimensions) are averaged, weighted by shard size; integer
    tensors keep their dtype, as under Lightning 1.9. Other tensors are joined along their first
    dimension, and lists with an entry per sample one after another. Anything else is the first
    shard's.

    Args:
        outputs: One per shard, of the same structure.
        sizes: The number of samples of each shard.
        device: Where the joined tensors lie.

    Raises:
        ValueError: Structures differ, or tensors do not fit; the message names the place.
    """
    return _join(outputs, sizes, device, "output")


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of tensors of one shape, on the first one's device and in its dtype."""
    first, total = values[0], float(sum(weights))
    if len(values) == 1 or total == 0:
        return first
    kind = first.dtype if first.dtype.is_floating_point or first.is_complex() else torch.float64
    mean = torch.zeros_like(first, dtype=kind)
    for value, weight in zip(values, weights, strict=True):
        mean += value.detach().to(first.device, kind) * (weight / total)
    return mean.to(first.dtype)


def are_per_sample(values: Sequence[Any], sizes: Sequence[int]) -> bool:
    """Whether these are lists with an entry per sample (texts, boxes), not `[logits, labels]`.

    The former have entries of one type; where those are dicts, whatever the sizes of the tensors in
    them.

    Args:
        values: One per part of a batch.
        sizes: The number of samples in each part.
    """
    if not all(type(v) is list and len(v) == n for v, n in zip(values, sizes, strict=True)):
        return False
    if len({type(entry) for value in values for entry in value}) > 1:
        return False
    return not all(
        _is_batched(entry, size)
        for value, size in zip(values, sizes, strict=True)
        for entry in value
    )


def _is_batched(value: Any, size: int) -> bool:
    """Whether it is a part of a batch: its tensors have the samples as their first dimension."""
    if isinstance(value, Mapping):
        return False
    return all(_is_array(leaf) and leaf.shape[0] == size for _, leaf in leaves(value))


def rebuild_sequence(example: Any, values: list[Any]) -> Any:
    """A sequence of the example's type."""
    return type(example)(*values) if hasattr(example, "_fields") else type(example)(values)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, each with how to get there; nothing if it is no container."""
    if isinstance(value, PackedSequence):
        return []
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        if names is not None:
            return [(f".{name}", part) for name, part in zip(names, value, strict=True)]
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def _is_container(value: Any) -> bool:
    if isinstance(value, PackedSequence):
        return False
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, (Mapping, list, tuple)) or is_dataclass


def _rebuild(value: Any, parts: list[Any], leaf: Callable[[Any], Any]) -> Any:
    if not _is_container(value):
        return leaf(value)
    if isinstance(value, Mapping):
        return _rebuild_mapping(value, dict(zip(value, parts, strict=True)))
    if isinstance(value, (list, tuple)):
        return rebuild_sequence(value, parts)
    copied = copy.copy(value)
    for field, part in zip(dataclasses.fields(value), parts, strict=True):
        object.__setattr__(copied, field.name, part)  # it may be frozen
    return copied


def _rebuild_mapping(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return parts
    kind: Any = type(value)
    try:
        return kind(parts)
    except TypeError:  # such as a `defaultdict`, which is made from a function
        copied: Any = copy.copy(value)
        for key, part in parts.items():
            copied[key] = part
        return copied


def leaves(value: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Everything in a batch that is no container, each with how to get there."""
    if not _is_container(value):
        yield path, value
    for name, part in _parts(value):
        yield from leaves(part, path + name)


def _is_array(value: Any) -> bool:
    """Whether it has a first dimension: a tensor, or an array of NumPy's kind."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return hasattr(value, "__array__") and len(getattr(value, "shape", ())) > 0


def _slice(value: Any, start: int, stop: int, size: int) -> Any:
    if _is_column(value, size):
        return value[start:stop]
    if not _is_container(value):
        return value[start:stop] if _is_array(value) else value
    parts = [_slice(part, start, stop, size) for _, part in _parts(value)]
    return _rebuild(value, parts, lambda leaf: leaf)


def _is_column(value: Any, size: int) -> bool:
    """Whether it is a list of texts with one per sample, as torch's collation leaves them."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == size
        and not hasattr(value, "_fields")
        and all(isinstance(entry, (str, bytes)) for entry in value)
    )


def _join(values: Sequence[Any], sizes: Sequence[int], device: torch.device, path: str) -> Any:
    first = values[0]
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        if all(isinstance(value, (bool, int, float)) for value in values):
            return _mean_of_numbers(values, sizes)
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"`{path}` is {names} on different replicas.")
    if isinstance(first, Tensor):
        return _join_tensors(values, sizes, device, path)
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return _mean_of_numbers(values, sizes)
    if are_per_sample(values, sizes):
        return [map_leaves(_to(device), entry) for value in values for entry in value]
    if not _is_container(first):
        return _join_arrays(values) if _is_array(first) else first
    return _join_containers(values, sizes, device, path)


def _join_containers(
    values: Sequence[Any], sizes: Sequence[int], device: torch.device, path: str
) -> Any:
    names = [[name for name, _ in _parts(value)] for value in values]
    if any(other != names[0] for other in names):
        raise ValueError(f"`{path}` has {names[0]} on replica 0 and {names[1:]} on the others.")
    columns = zip(*([part for _, part in _parts(value)] for value in values), strict=True)
    joined = [
        _join(column, sizes, device, path + name)
        for name, column in zip(names[0], columns, strict=True)
    ]
    return _rebuild(values[0], joined, lambda leaf: leaf)


def _join_tensors(
    values: Sequence[Tensor], sizes: Sequence[int], device: torch.device, path: str
) -> Tensor:
    if all(value.dim() == 0 for value in values):
        return weighted_mean([value.detach().to(device) for value in values], sizes)
    shapes = [tuple(value.shape) for value in values]
    if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
        raise ValueError(f"`{path}` has shapes {shapes} on the replicas, which cannot be joined.")
    return torch.cat([value.detach().to(device) for value in values])


def _join_arrays(values: Sequence[Any]) -> Any:
    import numpy as np  # what returns arrays has imported it

    return np.concatenate(list(values))


def _mean_of_numbers(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    total = sum(sizes)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / total


def _to(device: torch.device) -> Callable[[Any], Any]:
    def move(leaf: Any) -> Any:
        return leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf

    return move
