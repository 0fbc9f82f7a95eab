"""Side effects of a step on the replicas, transferred to the master.

The master's step wrote to the master itself; the others' to copies. What they have put into lists
and other containers is added to the master's, numbers that they have added to are added up, and
what cannot be merged is told.
"""

import operator
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mgpu.engine.data_parallel.copying.containers import Holding, state_of
from lightning_mgpu.engine.data_parallel.copying.copies import Copy
from lightning_mgpu.engine.data_parallel.copying.tensors import TensorCopy
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import (
    Additions,
    Tracked,
    additions_since,
    is_number,
    untracked,
)
from lightning_mgpu.engine.data_parallel.side_effects.additions import AdditionWatch
from lightning_mgpu.engine.data_parallel.side_effects.change import Change
from lightning_mgpu.engine.data_parallel.side_effects.equality import MISSING, all_equal
from lightning_mgpu.engine.data_parallel.side_effects.merge_rules import Judge
from lightning_mgpu.engine.data_parallel.side_effects.places import Places


class Effects:
    """Side effects of one step.

    Args:
        copies: The replicas that took part, but for the master.
        judge: Decides about numbers and tensors.
        watch: Knows how tensors are changed.
    """

    def __init__(self, copies: Sequence[Copy], judge: Judge, watch: AdditionWatch) -> None:
        self._copies = copies
        self._judge = judge
        self._watch = watch
        self._back: dict[int, Any] | None = None

    @torch.no_grad()
    def merge(self) -> None:
        """Merge effects into the master where possible, and warn of the others."""
        first = self._copies[0]
        # What is found on the copies under names is looked up before containers change.
        self._merge_buffers()
        self._merge_tensors()
        self._merge_attributes()
        for key, holding in list(first.remap.holdings.items()):
            others = [copied.remap.holdings.get(key) for copied in self._copies]
            self._merge_holding(holding, [other for other in others if other is not None])
        for name in first.tensors.written_while_shared():
            self._judge.shared(name)

    # Attributes of modules, and of objects that refer to modules

    def _merge_attributes(self) -> None:
        for index, (original, _) in enumerate(self._copies[0].watched):
            nows = [vars(copied.watched[index][1]) for copied in self._copies]
            befores = [copied.before[index] for copied in self._copies]
            where = type(original).__name__
            was = self._copies[0].was[index]
            self._merge_entries(Places(vars(original), was, nows, befores, where))

    def _merge_entries(self, places: Places) -> None:
        """Merge attributes, or entries of a dict, that any replica has changed."""
        for key in places.changed():
            if not places.is_dict and key in self._copies[0].passed_over:
                continue
            before = places.was.get(key, MISSING)
            old = places.target.get(key, before)
            values = [now.get(key, MISSING) for now in places.nows]
            roots = [holder.get(key, MISSING) for holder in places.befores]
            evidence = [
                self._evidence(before, root, value, places.counts or places.is_long())
                for root, value in zip(roots, values, strict=True)
            ]
            back = [self._returned(value) for value in values]
            change = Change(
                places.name(key),
                before,
                [old, *back],
                evidence,
                is_key=places.is_dict,
                is_count=places.counts or places.is_long(),
                owner=places.owner(key),
            )
            new = self._merged(change)
            if new is not MISSING and new is not places.target.get(key, MISSING):
                dict.__setitem__(places.target, key, new)

    def _merged(self, change: Change) -> Any:
        """The master's new value of one place."""
        first = change.values[0]
        if change.before is MISSING and change.is_key:
            return self._joined(change)
        settles = is_number(first) or isinstance(first, torch.Size)
        if not settles and all(value is first for value in change.values):
            return first
        if isinstance(change.before, Tensor):
            known = self._copies[0].tensors.find(change.before)
            if known is not None and known.before is not None:
                change.before = known.before
        return self._judge.outcome(change)

    def _joined(self, change: Change) -> Any:
        """Join the values that replicas have put under a new key of a dict."""
        present = [value for value in change.values if value is not MISSING]
        kinds = {type(value) for value in present}
        if len(present) < len(change.values) and all(map(is_number, present)):
            self._judge.found_on_some(change.owner)
        if len(present) == 1 or len(kinds) > 1:
            return present[0] if len(present) == 1 else self._judge.outcome(change)
        if isinstance(present[0], list):
            present[0].extend(entry for value in present[1:] for entry in value)
        elif isinstance(present[0], set):
            present[0].update(*present[1:])
        elif isinstance(present[0], Counter):
            for value in present[1:]:
                present[0].update(value)
        elif isinstance(present[0], dict):
            for key in dict.fromkeys(key for value in present for key in value):
                values = [value.get(key, MISSING) for value in present]
                evidence: list[Additions | None] = [None] * (len(values) - 1)
                name = f"{change.name}[{key!r}]"
                inner = Change(name, MISSING, values, evidence, True, owner=change.name)
                present[0][key] = self._joined(inner)
        else:
            return self._judge.outcome(change)
        return present[0]

    def _evidence(self, before: Any, root: Any, value: Any, counts: bool) -> Additions | None:
        if value is root:
            return Additions(constant=not counts)
        if root is MISSING:
            is_zero = isinstance(value, Tracked) and value.root.value == 0
            return self._with_loops(value, value.additions) if is_zero else None
        if isinstance(before, Tensor):
            known = self._copies[0].tensors.find(before)
            return None if known is None else self._watch.of(known)
        found = additions_since(root, value)
        if found is None and counts and type(root) is int and type(value) is int:
            return Additions(constant=False, count=1)
        return self._with_loops(value, found)

    def _with_loops(self, value: Any, found: Additions | None) -> Additions | None:
        """Mark additions as looped if their code ran several times on any replica."""
        site = getattr(value, "site", None)
        if found is None or site is None:
            return found
        looped = any(copied.remap.sites[site] > 1 for copied in self._copies)
        return replace(found, looped=looped)

    # Tensors

    def _merge_buffers(self) -> None:
        """Merge buffers that were assigned anew or registered."""
        for index, (target, _, _) in enumerate(self._copies[0].buffers.holders):
            if self._copies[0].buffers.is_recorded(index):
                continue
            holders = [copied.buffers.holders[index][1] for copied in self._copies]
            if target or any(holders):
                for key in dict.fromkeys(key for holder in (target, *holders) for key in holder):
                    self._merge_buffer(index, key, target, [h.get(key) for h in holders])

    def _merge_buffer(self, index: int, key: str, target: Any, nows: Sequence[Any]) -> None:
        known = [copied.buffers.known(index, key) for copied in self._copies]
        old, first = target.get(key), known[0]
        if old is (first and first.original) and all(
            now is (k and k.copied) for k, now in zip(known, nows, strict=True)
        ):
            return
        evidence = [None if first is None else self._watch.of(first)] * len(nows)
        before = MISSING if first is None or first.before is None else first.before
        name = self._copies[0].buffers.holders[index][2] + key
        new = self._judge.outcome(Change(name, before, [old, *nows], evidence))
        if new is not old:
            target[key] = new

    def _merge_tensors(self) -> None:
        """Merge tensors that were written to in place."""
        for copied in list(self._copies[0].tensors):
            others = [c.tensors.find(copied.original) for c in self._copies]
            found = [other for other in others if other is not None]
            if any(other.is_written() for other in found):
                self._merge_written(copied, found)

    def _merge_written(self, first: TensorCopy, copies: Sequence[TensorCopy]) -> None:
        values = [first.original, *(copied.copied for copied in copies)]
        if first.before is None:
            if self._judge.is_due(first.name) and not all_equal(values):
                self._judge.lost(first.name)
            return  # large: only whether the replicas agree can be said
        evidence = [self._watch.of(first)] * len(copies)
        new = self._judge.outcome(Change(first.name, first.before, values, evidence))
        if new is not first.original:
            first.original.copy_(new)

    # Containers, arrays and plain objects

    def _merge_holding(self, first: Holding, holdings: Sequence[Holding]) -> None:
        original = first.original
        if isinstance(original, dict):
            self._merge_dict(first, holdings)
        elif isinstance(original, list):
            self._merge_list(first, holdings)
        elif isinstance(original, deque):
            for holding in holdings:
                added = _appended(holding.before, list(holding.copied))
                original.extend(self._returned(entry) for entry in added)
        elif isinstance(original, set):
            for holding in holdings:
                original.difference_update(set(holding.before) - holding.copied)
                new = holding.copied.difference(holding.before)
                original.update(self._returned(entry) for entry in new)
        elif isinstance(original, np.ndarray):
            self._merge_array(first, holdings)
        else:
            self._merge_object(first, holdings)

    def _merge_dict(self, first: Holding, holdings: Sequence[Holding]) -> None:
        original = first.original
        for holding in holdings:
            for key in holding.before.keys() - holding.copied.keys():
                if key in original and original[key] is first.was.get(key, MISSING):
                    dict.__delitem__(original, key)
        nows = [holding.copied for holding in holdings]
        befores = [holding.before for holding in holdings]
        places = Places(original, first.was, nows, befores, first.where, is_dict=True)
        if not isinstance(original, Counter):
            self._merge_entries(places)
            return
        self._merge_entries(places.as_counts())
        for key in places.was.keys() - first.was.keys():
            if not original[key]:
                del original[key]

    def _merge_list(self, first: Holding, holdings: Sequence[Holding]) -> None:
        original, was, size = first.original, first.was, len(first.was)
        lists = [holding.copied for holding in holdings]
        if all(len(h.copied) != size and _is_refilled(h.copied, h.before) for h in holdings):
            size = 0  # cleared before anything was appended
        elif all(len(entries) >= size for entries in (original, *lists)):
            pairs = [(original, was), *((h.copied, h.before) for h in holdings)]
            if not all(all(map(operator.is_, now, before)) for now, before in pairs):
                self._merge_positions(first, holdings)
        elif len({len(entries) for entries in (original, *lists)}) > 1:
            self._judge.lost(first.where)
        for entries in lists:
            original.extend(self._returned(entry) for entry in entries[size:])

    def _merge_positions(self, first: Holding, holdings: Sequence[Holding]) -> None:
        """Merge replaced entries of a list."""
        size = len(first.was)
        nows = [dict(enumerate(holding.copied[:size])) for holding in holdings]
        befores = [dict(enumerate(holding.before)) for holding in holdings]
        target, was = dict(enumerate(first.original[:size])), dict(enumerate(first.was))
        self._merge_entries(Places(target, was, nows, befores, first.where, is_dict=True))
        first.original[:size] = target.values()

    def _merge_array(self, first: Holding, holdings: Sequence[Holding]) -> None:
        before, arrays = first.before, [first.original, *(h.copied for h in holdings)]
        if all(np.array_equal(array, before, equal_nan=_has_nan(before)) for array in arrays):
            return
        values = [torch.from_numpy(np.asarray(array)) for array in (before, *arrays)]
        sums: list[Additions | None] = [None] * len(holdings)
        if before.dtype.kind in "iu" and not all_equal(values[1:]):
            sums = [Additions(constant=False, count=1)] * len(holdings)
        new = self._judge.outcome(Change(first.where, values[0], values[1:], sums))
        if new is not values[1]:
            first.original[...] = new.numpy()

    def _merge_object(self, first: Holding, holdings: Sequence[Holding]) -> None:
        held = state_of(first.original)
        target = dict(held)
        nows = [state_of(holding.copied) for holding in holdings]
        befores = [holding.before for holding in holdings]
        self._merge_entries(Places(target, first.was, nows, befores, first.where))
        for key, value in target.items():
            if value is not held.get(key, MISSING):
                object.__setattr__(first.original, key, value)

    def _returned(self, value: Any) -> Any:
        """Translate a copy's value into the master's."""
        if self._back is None:
            self._back = {}
            for copied in self._copies:
                for holding in copied.remap.holdings.values():
                    self._back[id(holding.copied)] = holding.original
                for tensor in copied.tensors:
                    self._back[id(tensor.copied)] = tensor.original
        return self._back.get(id(value), untracked(value))


def _is_refilled(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Return whether a list holds none of its former entries."""
    old = set(map(id, before))
    return not any(id(entry) in old for entry in now)


def _appended(before: Sequence[Any], after: Sequence[Any]) -> Sequence[Any]:
    """The items that a deque, which may have dropped as many at its head, has gained."""
    for dropped in range(len(before) + 1):
        kept = before[dropped:]
        if len(kept) <= len(after) and all(a is b for a, b in zip(kept, after, strict=False)):
            return after[len(kept) :]
    return []


def _has_nan(array: Any) -> bool:
    return array.dtype.kind in "fc"
