"""Decide how parts of outputs are joined, from their lengths and from earlier batches."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mgpu.engine.batch.containers import attributes_of, is_array, leaves
from lightning_mgpu.engine.batch.inspection import signature

log = logging.getLogger(__name__)

Role = Literal["mean", "sum", "same", "entries", "columns", "ragged", "keys"] | int
"""How a part of the outputs is joined; a number is the dimension along which arrays are."""


class JoinMemory:
    """Memory of the outputs of one kind of step in earlier batches, by place.

    Attributes:
        roles: How each place was joined, where its values proved it.
    """

    def __init__(self) -> None:
        self.roles: dict[str, Role] = {}
        self._told: set[str] = set()
        self._is_silent = False

    def silent(self) -> "JoinMemory":
        """Return a copy that logs no warnings."""
        made = JoinMemory()
        made.roles, made._is_silent = dict(self.roles), True
        return made

    def tell(self, path: str, text: str) -> None:
        """Warn about a place, once."""
        if path not in self._told and not self._is_silent:
            self._told.add(path)
            log.warning("`%s` %s", path, text)


class Roles:
    """Tells how to join what the shards of one batch have returned.

    Args:
        sizes: The number of samples of each shard.
        weights: What each shard weighs by in means.
        memory: What is known of outputs of this kind.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[int], memory: JoinMemory) -> None:
        self._sizes, self._weights, self._memory = list(sizes), weights, memory

    def of_arrays(self, values: Sequence[Any], path: str) -> Role:
        """Find the dimension along which arrays are joined."""
        shapes = [tuple(value.shape) for value in values]
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(f"`{path}` has shapes {listed(shapes)}, which cannot be joined.")
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
        if not exact and (flattened or (rows == list(self._weights) and agree(shapes, 0))):
            return 0  # tokens, or what shards weigh by, such as nodes of graphs
        if not exact and agree(shapes, 0):
            if len(set(rows)) > 1 or known == "ragged":
                return "ragged"
            if all(_equal_arrays(value, values[0]) for value in values):
                return "same"
        raise ValueError(
            f"Ambiguous: `{path}` has shapes {listed(shapes)} for {listed(list(self._sizes))}"
            " samples, and several dimensions may be the batch. Return an entry per sample."
        )

    def _is_batch(self, shapes: Sequence[tuple[int, ...]], dim: int, factor: int) -> bool:
        fits = all(s[dim] == factor * n for s, n in zip(shapes, self._sizes, strict=True))
        return fits and agree(shapes, dim)

    def are_entries(self, values: Sequence[Any], path: str, inside: bool) -> bool:
        """Return whether there is an entry per sample (texts, boxes), unlike `[logits, labels]`."""
        lengths = [len(value) for value in values]
        if lengths != list(self._sizes):
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"`{path}` has {listed(lengths)} entries for {listed(list(self._sizes))}"
                    " samples: neither one per sample nor the same number for each part."
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
            if isinstance(values[0], tuple) and lengths[0] == 2 and all(map(is_number, values[0])):
                raise ValueError(
                    f"Ambiguous: `{path}` has two numbers for two samples. Return a list for a"
                    " number per sample, or a dict for two numbers per batch."
                )
            return True
        return not self._are_columns(values, all(fitting), path, inside)

    def _fit(self, column: Sequence[Any]) -> bool:
        """Return whether one position holds arrays that are as long as the shards."""
        found = [
            leaf.shape[0] == size
            for value, size in zip(column, self._sizes, strict=True)
            for _, leaf in _deep_leaves(value)
            if is_array(leaf)
        ]
        return bool(found) and all(found)

    def _are_columns(self, values: Sequence[Any], all_fit: bool, path: str, inside: bool) -> bool:
        """Return whether lists with as many entries as samples are columns, not samples."""
        entries = [entry for value in values for entry in value]
        alike = len({signature(entry) for entry in entries}) == 1
        if inside or isinstance(values[0], tuple):
            return all_fit or not alike
        if not alike and all_fit:
            return True
        if alike and (not all_fit or isinstance(entries[0], Mapping) or len(values[0]) > 2):
            return False
        raise ValueError(
            f"Ambiguous: `{path}` is a list of {len(values[0])} entries for as many samples:"
            " one per sample, or arrays for all of them. Return a tuple or a dict for arrays."
        )

    def are_keys_of_samples(self, values: Sequence[Mapping[Any, Any]]) -> bool:
        """Return whether a mapping has a key for each sample, such as the number of its image."""
        keys = [key for value in values for key in value]
        lengths = [len(value) for value in values]
        return len(values) > 1 and lengths == list(self._sizes) and len(set(keys)) == len(keys)


def is_number(value: Any) -> bool:
    """Return whether `value` is a number or a zero-dimensional tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, (bool, int, float))


def agree(shapes: Sequence[tuple[int, ...]], dim: int) -> bool:
    """Return whether the shapes are the same except for one dimension."""
    return len({shape[:dim] + shape[dim + 1 :] for shape in shapes}) == 1


def _equal_arrays(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    return bool((a == b).all())


def _deep_leaves(value: Any) -> list[tuple[str, Any]]:
    """The leaves of a value, those among the attributes of objects included."""
    found = []
    for path, leaf in leaves(value):
        inner = {} if is_array(leaf) or isinstance(leaf, (Tensor, type)) else attributes_of(leaf)
        found += [pair for part in inner.values() for pair in leaves(part)] or [(path, leaf)]
    return found


def listed(values: Sequence[Any]) -> str:
    """Format values for a message."""
    return " and ".join(map(str, values))
