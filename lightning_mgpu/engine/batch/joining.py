"""Join the outputs of a batch's shards into the output of one step on the whole batch.

What an output is, is decided from all shards at once: an array is joined along the dimension that
is as long as each shard has samples, a list or tuple with as many entries as samples is joined
entry by entry, numbers are averaged or added up. `docs/batches.md` has the rules as a table.
"""

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.batch.containers import (
    attributes_of,
    holds_tensors,
    is_array,
    is_container,
    is_sequence,
    leaves,
    map_leaves,
    parts,
    rebuild,
)
from lightning_mgpu.engine.batch.graphs import is_graph_batch, join_graphs
from lightning_mgpu.engine.batch.layout import Dimensions
from lightning_mgpu.engine.batch.roles import JoinMemory, Role, Roles, agree, is_number, listed

log = logging.getLogger(__name__)


def join(
    outputs: Sequence[Any],
    sizes: Sequence[int],
    device: torch.device,
    memory: JoinMemory | None = None,
    dim: Dimensions | None = None,
    samples: Sequence[int] | None = None,
) -> Any:
    """Put the shards' outputs together as one step on the whole batch would have returned them.

    Args:
        outputs: One per shard, of the same structure.
        sizes: The number of samples of each shard; or what else they weigh by in means.
        device: Where the joined tensors lie.
        memory: What is known of outputs of this kind; default: nothing.
        dim: The batch dimension of the tensors, if it is not to be found out; for all or by the key
            or position of the output's parts.
        samples: The number of samples of each shard, if `sizes` is something else.

    Raises:
        ValueError: Structures differ, or something does not fit; the message names the place.
    """
    joiner = Joining(sizes, device, memory or JoinMemory(), dim, samples)
    return joiner.moved(outputs[0]) if len(outputs) == 1 else joiner.join(outputs, "output", None)


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of tensors of one shape, on the first one's device and in its dtype.

    What weighs nothing does not count, so that a NaN of no samples is none of the whole.
    """
    first, total = values[0], float(sum(weights))
    if len(values) == 1 or total == 0:
        return first
    kind = first.dtype if first.dtype.is_floating_point or first.is_complex() else torch.float64
    mean = torch.zeros_like(first, dtype=kind)
    for value, weight in zip(values, weights, strict=True):
        if weight:
            mean += value.detach().to(first.device, kind) * (weight / total)
    return mean.to(first.dtype)


class Joining:
    """Join one set of outputs; `roles` decides how each place is joined."""

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device | None,
        memory: JoinMemory,
        dim: Dimensions | None,
        samples: Sequence[int] | None = None,
    ) -> None:
        self._weights = sizes
        self._sizes = list(sizes if samples is None else samples)
        self._device = device
        self._memory = memory
        self._dim = dim
        self._roles = Roles(self._sizes, sizes, memory)
        self.roles: dict[str, Role] = {}

    def join(self, values: Sequence[Any], path: str, top: Any, inside: bool = False) -> Any:
        """Join the values of one place.

        Args:
            values: One per shard.
            path: Where it is.
            top: Key or position of the output's part that it is in.
            inside: Whether it is an attribute of an object, whose lists have a fixed length.
        """
        first = values[0]
        if all(is_number(value) for value in values):
            return self._numbers(values, path)
        kinds = {type(value) for value in values}
        if len(kinds) > 1:
            names = " and ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"`{path}` is {names} on different replicas.")
        if is_array(first):
            return self._arrays(values, path, top)
        if is_graph_batch(first):
            return join_graphs([self.moved(value) for value in values])
        if is_sequence(first) and self._roles.are_entries(values, path, inside):
            self._note(path, "entries")
            return rebuild(first, [self.moved(entry) for value in values for entry in value])
        if is_container(first):
            return self._containers(values, path, top, inside)
        return self._objects(values, path, top)

    def _note(self, path: str, role: Role, proven: bool = False) -> None:
        self.roles[path] = role
        if proven:
            self._memory.roles[path] = role

    def moved(self, value: Any) -> Any:
        """A value, its tensors without a graph and on the device."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) and not is_graph_batch(leaf):
                return leaf
            leaf = leaf.detach()
            return leaf if self._device is None else leaf.to(self._device)

        return map_leaves(move, value)

    # Numbers and tensors without dimensions

    def _numbers(self, values: Sequence[Any], path: str) -> Any:
        if all(_is_integer(value) for value in values):
            return self._counts(values, path)
        self._note(path, "mean")
        if all(isinstance(value, Tensor) for value in values):
            return weighted_mean([self.moved(value) for value in values], self._weights)
        numbers = [float(value) for value in values]
        if all(number == numbers[0] for number in numbers):
            return values[0]
        pairs = [(n, size) for n, size in zip(numbers, self._weights, strict=True) if size]
        return sum(n * size for n, size in pairs) / sum(size for _, size in pairs)

    def _counts(self, values: Sequence[Any], path: str) -> Any:
        """Integers: what every shard has counted is added up; what is the same everywhere stays."""
        first = self.moved(values[0])
        if len(values) == 1:
            self._note(path, "same")
            return first
        numbers = [int(value) for value in values]
        known = self._memory.roles.get(path)
        if all(number == numbers[0] for number in numbers) and known != "sum":
            if numbers != list(self._sizes) or isinstance(first, bool):
                self._note(path, "same")
                return first
        elif isinstance(first, bool) or (isinstance(first, Tensor) and first.dtype == torch.bool):
            return self._first_of(values, path)
        elif numbers not in (list(self._sizes), list(self._weights)):
            self._memory.tell(
                path,
                f"is a different integer for each part of the batch ({listed(numbers)}); they"
                " were summed, as counts are. If it is not a count, return a float, which is"
                " averaged, or give `gather_fn` a function that joins the outputs.",
            )
        self._note(path, "sum", proven=True)
        total = sum(numbers)
        return torch.full_like(first, total) if isinstance(first, Tensor) else type(first)(total)

    # Arrays

    def _arrays(self, values: Sequence[Any], path: str, top: Any) -> Any:
        if self._dim is not None:
            wanted = self._dim if isinstance(self._dim, int) else self._dim.get(top, 0)
            role: Role = wanted if wanted < len(values[0].shape) else 0
        else:
            role = self._roles.of_arrays(values, path)
        self._note(path, role, proven=role == "ragged")
        values = [self.moved(value) for value in values]
        if role == "same" or len(values) == 1:
            return values[0]
        return _concatenated(values, role if isinstance(role, int) else 0, path)

    # Other containers, and objects

    def _containers(self, values: Sequence[Any], path: str, top: Any, inside: bool) -> Any:
        first = values[0]
        names = [[name for name, _ in parts(value)] for value in values]
        if isinstance(first, Mapping) and self._roles.are_keys_of_samples(values):
            self._note(path, "keys")
            merged = {key: self.moved(part) for value in values for key, part in value.items()}
            return merged if type(first) is dict else type(first)(merged)  # type: ignore[call-arg]
        if any(set(other) != set(names[0]) for other in names):
            raise ValueError(f"`{path}` has {names[0]} on replica 0 and {names[1:]} on the others.")
        if is_sequence(first):
            self._note(path, "columns")
        keys = list(first) if isinstance(first, Mapping) else range(len(names[0]))
        lookups = [dict(parts(value)) for value in values]
        joined = [
            self.join([x[name] for x in lookups], path + name, key if top is None else top, inside)
            for key, name in zip(keys, names[0], strict=True)
        ]
        return rebuild(first, joined)

    def _objects(self, values: Sequence[Any], path: str, top: Any) -> Any:
        first = values[0]
        if len(values) == 1 or all(_equal(value, first) for value in values[1:]):
            if first is not None:
                self._note(path, "same")
            return first
        if holds_tensors(first) and not isinstance(first, (set, frozenset)):
            return self._attributes(values, path, top)
        return self._first_of(values, path)

    def _attributes(self, values: Sequence[Any], path: str, top: Any) -> Any:
        """An object with tensors, such as a cache: attribute by attribute."""
        found = [attributes_of(value) for value in values]
        if any(other.keys() != found[0].keys() for other in found):
            raise ValueError(f"`{path}` has different attributes on different replicas.")
        joined = copy.copy(values[0])
        for name in found[0]:
            parts_of_it = [attributes[name] for attributes in found]
            object.__setattr__(
                joined, name, self.join(parts_of_it, f"{path}.{name}", top, inside=True)
            )
        return joined

    def _first_of(self, values: Sequence[Any], path: str) -> Any:
        self._note(path, "same")
        self._memory.tell(
            path,
            f"differs between the parts of the batch (a `{type(values[0]).__name__}`); the"
            " first part's is kept. Return a list with an entry per sample, or give"
            " `gather_fn` a function that joins the outputs.",
        )
        return values[0]


def gather(outputs: Sequence[Any], sizes: Sequence[int], dim: Dimensions = 0) -> Any:
    """Join outputs along another dimension: ``gather_fn=partial(gather, dim=1)``.

    Args:
        outputs: What the step has returned for each shard.
        sizes: The number of samples in each shard.
        dim: The batch dimension of tensors that have that many dimensions, for all of them or by
            key or position in the output: ``{"attention": 1}``. Other tensors have it first.

    Returns:
        The output of the whole batch, on the device of its first tensor.

    Raises:
        ValueError: As for `join`.
    """
    tensors = [leaf for _, leaf in leaves(outputs[0]) if isinstance(leaf, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    return join(outputs, sizes, device, dim=dim)


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, int)


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # a user's class decides what comparing means
        return False


def _concatenated(values: Sequence[Any], dim: int, path: str) -> Any:
    shapes = [tuple(value.shape) for value in values]
    if not agree(shapes, dim):
        raise ValueError(f"`{path}` has shapes {listed(shapes)}, which cannot be joined.")
    if hasattr(type(values[0]), "__torch_function__"):
        return torch.cat(list(values), dim)
    if hasattr(values[0], "iloc"):
        return sys.modules["pandas"].concat(list(values))
    import numpy as np  # what returns arrays has imported it

    return np.concatenate(list(values), dim)
