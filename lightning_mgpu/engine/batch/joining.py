"""Put together what the shards of a batch have returned, as one step on all of it would have.

What an output is, is decided from all shards at once: an array is joined along the dimension that
is as long as each shard has samples, a list or tuple with as many entries as samples is joined
entry by entry, numbers are averaged or added up. `docs/batches.md` has the rules as a table.
"""

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
from lightning_mgpu.engine.batch.layout import Dimensions, signature
from lightning_mgpu.engine.graphs import is_graph_batch, join_graphs

log = logging.getLogger(__name__)

Role = Literal["mean", "sum", "same", "entries", "columns", "ragged", "keys"] | int
"""How a part of the outputs is joined; a number is the dimension along which arrays are."""


class JoinMemory:
    """What the outputs of one kind of step were in earlier batches, by place.

    Attributes:
        roles: How each place was joined, where its values proved it.
    """

    def __init__(self) -> None:
        self.roles: dict[str, Role] = {}
        self._told: set[str] = set()
        self._is_silent = False

    def silent(self) -> "JoinMemory":
        """A copy that warns of nothing."""
        made = JoinMemory()
        made.roles, made._is_silent = dict(self.roles), True
        return made

    def tell(self, path: str, text: str) -> None:
        """Warn of a place, once."""
        if path not in self._told and not self._is_silent:
            self._told.add(path)
            log.warning("`%s` %s", path, text)


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
    joiner = _Join(sizes, device, memory or JoinMemory(), dim, samples)
    return joiner.moved(outputs[0]) if len(outputs) == 1 else joiner.join(outputs, "output", None)


def join_samples(
    outputs: Sequence[Any], sizes: Sequence[int], memory: JoinMemory | None = None
) -> "Samples | None":
    """Outputs of many batches, to be taken apart by sample; `None` where they cannot be.

    Args:
        outputs: One per batch.
        sizes: The number of samples in each batch.
        memory: As for `join`.
    """
    joiner = _Join(sizes, None, memory or JoinMemory(), None)
    try:
        joined = joiner.join(outputs, "output", None)
    except ValueError:
        return None
    by_sample = all(role in (0, "entries", "columns") for role in joiner.roles.values())
    return Samples(joined, joiner.roles) if by_sample and joiner.roles else None


class Samples:
    """Joined outputs, each part of which has an entry per sample.

    Attributes:
        joined: The outputs, joined.
    """

    def __init__(self, joined: Any, roles: Mapping[str, Role]) -> None:
        self.joined = joined
        self._roles = roles

    def take(self, order: Any) -> Any:
        """The samples at the given positions (an integer array), in that order."""
        return self._take(self.joined, order, "output")

    def _take(self, value: Any, order: Any, path: str) -> Any:
        if self._roles.get(path) == "entries":
            entries = list(value)
            return rebuild(value, [entries[i] for i in order])
        if is_container(value):
            return rebuild(value, [self._take(p, order, path + name) for name, p in parts(value)])
        if isinstance(value, Tensor):
            return value[torch.as_tensor(order, device=value.device)]
        if is_array(value):
            return value.iloc[order] if hasattr(value, "iloc") else value[order]
        return value


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


class _Join:
    """One joining of outputs; `roles` is how each place was joined."""

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
        if all(_is_number(value) for value in values):
            return self._numbers(values, path)
        kinds = {type(value) for value in values}
        if len(kinds) > 1:
            names = " and ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"`{path}` is {names} on different replicas.")
        if is_array(first):
            return self._arrays(values, path, top)
        if is_graph_batch(first):
            return join_graphs([self.moved(value) for value in values])
        if is_sequence(first) and self._are_entries(values, path, inside):
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
                f"is another whole number for each part of the batch ({_listed(numbers)}); they are"
                " added up, as counts are. If it is none, return a float, which is averaged, or"
                " give `gather_fn` a function that joins the outputs.",
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
            role = self._role(values, path)
        self._note(path, role, proven=role == "ragged")
        values = [self.moved(value) for value in values]
        if role == "same" or len(values) == 1:
            return values[0]
        return _concatenated(values, role if isinstance(role, int) else 0, path)

    def _role(self, values: Sequence[Any], path: str) -> Role:
        """Along which dimension arrays are joined."""
        shapes = [tuple(value.shape) for value in values]
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(f"`{path}` has shapes {_listed(shapes)}, which cannot be joined.")
        exact = [d for d in range(len(shapes[0])) if self._is_batch(shapes, d, 1)]
        known = self._memory.roles.get(path)
        if known in exact:
            return known
        if exact[:1] == [0]:
            if len(exact) == 1:
                self._memory.roles[path] = 0
            return 0
        rows = [shape[0] for shape in shapes]
        factor = rows[0] // self._sizes[0] if self._sizes[0] else 0
        flattened = factor > 1 and self._is_batch(shapes, 0, factor)
        if len(exact) == 1 and not flattened:
            self._memory.roles[path] = exact[0]
            return exact[0]
        if not exact and (flattened or (rows == list(self._weights) and _agree(shapes, 0))):
            return 0  # tokens, or what shards weigh by, such as nodes of graphs
        if not exact and _agree(shapes, 0):
            if len(set(rows)) > 1 or known == "ragged":
                return "ragged"
            if all(_equal_arrays(value, values[0]) for value in values):
                return "same"
        raise ValueError(
            f"`{path}` has shapes {_listed(shapes)} for {_listed(list(self._sizes))} samples, and"
            " which dimension is the batch cannot be told. Return an entry per sample."
        )

    def _is_batch(self, shapes: Sequence[tuple[int, ...]], dim: int, factor: int) -> bool:
        fits = all(s[dim] == factor * n for s, n in zip(shapes, self._sizes, strict=True))
        return fits and _agree(shapes, dim)

    # Lists and tuples

    def _are_entries(self, values: Sequence[Any], path: str, inside: bool) -> bool:
        """Whether these have an entry per sample (texts, boxes), unlike `[logits, labels]`."""
        lengths = [len(value) for value in values]
        if lengths != list(self._sizes):
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"`{path}` has {_listed(lengths)} entries for {_listed(list(self._sizes))}"
                    " samples, which are neither an entry per sample nor the same for all."
                )
            if any(lengths):
                self._memory.roles[path] = "columns"
            return False
        known = self._memory.roles.get(path)
        if known is not None:
            return known == "entries"
        if len(set(lengths)) > 1:
            self._memory.roles[path] = "entries"
            return True
        fitting = [self._fit(column) for column in zip(*values, strict=True)]
        if not any(fitting):
            if isinstance(values[0], tuple) and lengths[0] == 2 and all(map(_is_number, values[0])):
                raise ValueError(
                    f"`{path}` has two numbers for as many samples, which may be one for each, or"
                    " two for all of them. Return a list for the former, a dict for the latter."
                )
            return True
        return not self._are_columns(values, all(fitting), path, inside)

    def _fit(self, column: Sequence[Any]) -> bool:
        """Whether one position holds arrays that are as long as the shards."""
        found = [
            leaf.shape[0] == size
            for value, size in zip(column, self._sizes, strict=True)
            for _, leaf in _deep_leaves(value)
            if is_array(leaf)
        ]
        return bool(found) and all(found)

    def _are_columns(self, values: Sequence[Any], all_fit: bool, path: str, inside: bool) -> bool:
        """As many entries as samples, some of which are as long as the shards, too."""
        entries = [entry for value in values for entry in value]
        alike = len({signature(entry) for entry in entries}) == 1
        if inside or isinstance(values[0], tuple):
            return all_fit or not alike
        if not alike and all_fit:
            return True
        if alike and (not all_fit or isinstance(entries[0], Mapping) or len(values[0]) > 2):
            return False
        raise ValueError(
            f"`{path}` is a list of {len(values[0])} entries for as many samples, and each may be"
            " one sample's or an array for all of them. Return a tuple or a dict for the latter."
        )

    # Other containers, and objects

    def _containers(self, values: Sequence[Any], path: str, top: Any, inside: bool) -> Any:
        first = values[0]
        names = [[name for name, _ in parts(value)] for value in values]
        if isinstance(first, Mapping) and self._are_keys_of_samples(values):
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

    def _are_keys_of_samples(self, values: Sequence[Mapping[Any, Any]]) -> bool:
        """Whether a mapping has a key for each sample, such as the number of its image."""
        keys = [key for value in values for key in value]
        lengths = [len(value) for value in values]
        return len(values) > 1 and lengths == list(self._sizes) and len(set(keys)) == len(keys)

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
            raise ValueError(f"`{path}` has other attributes on other replicas.")
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
            f"is something else for each part of the batch (a `{type(values[0]).__name__}`); the"
            " first is kept. Return a list with an entry per sample, or give `gather_fn` a function"
            " that joins the outputs.",
        )
        return values[0]


def gather(outputs: Sequence[Any], sizes: Sequence[int], dim: Dimensions = 0) -> Any:
    """Join outputs along another dimension: ``gather_fn=partial(gather, dim=1)``.

    Args:
        outputs: What the step has returned for each shard.
        sizes: The number of samples in each shard.
        dim: The batch dimension of tensors that have that many dimensions, for all of them or by
            key or position in the output: ``{"attention": 1}``. Other tensors have it first.

    Raises:
        ValueError: As for `join`.
    """
    tensors = [leaf for _, leaf in leaves(outputs[0]) if isinstance(leaf, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    return join(outputs, sizes, device, dim=dim)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, (bool, int, float))


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, int)


def _agree(shapes: Sequence[tuple[int, ...]], dim: int) -> bool:
    """Whether shapes are the same but for one dimension."""
    return len({shape[:dim] + shape[dim + 1 :] for shape in shapes}) == 1


def _equal_arrays(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    return bool((a == b).all())


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # a user's class decides what comparing means
        return False


def _deep_leaves(value: Any) -> list[tuple[str, Any]]:
    """The leaves of a value, those among the attributes of objects included."""
    found = []
    for path, leaf in leaves(value):
        inner = {} if is_array(leaf) or isinstance(leaf, (Tensor, type)) else attributes_of(leaf)
        found += [pair for part in inner.values() for pair in leaves(part)] or [(path, leaf)]
    return found


def _concatenated(values: Sequence[Any], dim: int, path: str) -> Any:
    shapes = [tuple(value.shape) for value in values]
    if not _agree(shapes, dim):
        raise ValueError(f"`{path}` has shapes {_listed(shapes)}, which cannot be joined.")
    if hasattr(type(values[0]), "__torch_function__"):
        return torch.cat(list(values), dim)
    if hasattr(values[0], "iloc"):
        return sys.modules["pandas"].concat(list(values))
    import numpy as np  # what returns arrays has imported it

    return np.concatenate(list(values), dim)


def _listed(values: Sequence[Any]) -> str:
    return " and ".join(map(str, values))
