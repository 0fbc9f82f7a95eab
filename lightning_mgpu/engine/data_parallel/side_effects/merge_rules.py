"""Rules for merging a value that the replicas have changed, and the warnings about it.

For a number, or a small tensor, let d be what each replica has added, and s the size of its shard:

    only additions -- constants of the source, each once -- d equal ----------> once
          |                                            +--- else -------------> sum, told
          +---------- other -- d differ, whole numbers -----------------------> sum
          |                +-- d differ, and are the losses of the shards ----> mean
          |                +-- d differ, and are those times s ---------------> sum
          |                +-- d differ otherwise ----------------------------> sum, told
          |                +-- d equal, and so many for each sample ----------> sum
          |                +-- d equal otherwise ------> in doubt, until a later step shows which
    assigned ---------------- the same everywhere ----------------------------> that
          +------------------ the losses of the shards -----------------------> mean
          +------------------ else -------------------------------------------> replica 0's, told
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import is_number
from lightning_mgpu.engine.data_parallel.side_effects.change import Change, of_new_key
from lightning_mgpu.engine.data_parallel.side_effects.equality import MISSING, all_equal
from lightning_mgpu.engine.data_parallel.side_effects.scalars import (
    close,
    copied,
    is_integer,
    is_scalar,
    is_scalar_like,
    is_whole,
    number,
    together,
)

log = logging.getLogger(__name__)

Rule = Literal["sum", "once", "mean"]

_ENOUGH_STEPS = 4
# Compared at every change; all else, tensors and what may hold them, ever more rarely.
_CHEAP = (bool, int, float, complex, str, bytes, type(None), torch.Size)


@dataclass
class _Doubt:
    """An addition that may be one per step or one per sample.

    Attributes:
        rule: How it has been taken so far.
        owner: The dict that it is in, or itself.
        steps: How often.
        owed: What is to be added if it turns out to be the other.
        value: What it came to by the last step; if it has another value now, it was reset.
    """

    rule: Rule
    owner: str
    steps: int = 0
    owed: Any = 0
    value: Any = None


class Judge:
    """Decide about changes, remember decisions, and warn of each thing once."""

    def __init__(self) -> None:
        self.sizes: Sequence[int] = ()
        self.references: Callable[[], Sequence[Sequence[float]]] = tuple
        self._told: set[tuple[str, str]] = set()
        self._settled: dict[str, Rule] = {}
        self._doubts: dict[str, _Doubt] = {}
        self._independent: set[str] = set()
        self._lost: set[str] = set()
        self._means: set[str] = set()
        self._weights: Sequence[float] = ()
        self._changes: dict[str, int] = {}
        self._counts: set[str] = set()

    def begin(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        """Start a step on shards of these sizes, which weigh so much in means."""
        self.sizes, self._weights = sizes, weights
        self.references = tuple

    def outcome(self, change: Change) -> Any:
        """The value that the master's place is to have."""
        if change.before is MISSING and change.is_key:
            change = of_new_key(change)
        values = [change.before, *change.values]
        proven = all(addition is not None for addition in change.evidence)
        if proven and all(map(is_scalar_like, values)):
            return self._added(change)
        return self._assigned(change)

    def lost(self, name: str, owner: str = "") -> None:
        """Warn that replicas have left different values in a place."""
        self._lost.add(name)
        self._tell(
            name,
            "The step writes a different value to `%s` on each replica; replica 0's is kept."
            " To keep all of them, log it with `self.log`, append it to a list or return it.",
            owner,
        )

    def found_on_some(self, owner: str) -> None:
        """Learn that keys of a dict depend on the data, so that its numbers count samples."""
        self._counts.add(owner)

    def is_due(self, name: str) -> bool:
        """Return whether to compare tensors at this change: the first, second, fourth and so on."""
        count = self._changes[name] = self._changes.get(name, 0) + 1
        return count & (count - 1) == 0

    def shared(self, name: str) -> None:
        """Warn that all replicas write to the same memory."""
        self._tell(
            name,
            "The step writes to `%s`, which is too large to be copied for each replica, so"
            " that all replicas have written to the same memory at once. Register it as a"
            " buffer, or write to it in a hook such as `on_train_batch_end`, which runs once.",
        )

    def outside(self, name: str) -> None:
        """Warn that a step writes to a variable outside of the model."""
        self._tell(
            name,
            "The step, or a hook on a module, writes to the variable `%s` outside of the"
            " model. All replicas share it, each in its own thread, and may read what another"
            " has written. Keep it in an attribute of the LightningModule (`self`).",
        )

    def finish(self) -> None:
        """Warn of what could not be decided in this run."""
        for name, doubt in self._doubts.items():
            if doubt.rule == "sum" and doubt.owner in self._counts:
                continue  # as for other keys of the same dict
            taken = "once a step" if doubt.rule == "once" else "for every shard"
            self._tell(
                name,
                "Ambiguous: every replica added the same number to `%s` in each step, on"
                " shards of the same size: once per step, or once per shard. It was added"
                f" {taken}. If that is wrong, count in a hook such as `on_train_batch_end`,"
                " which runs once and sees the whole batch.",
                doubt.owner,
            )
        self._doubts = {}

    def _added(self, change: Change) -> Any:
        deltas = [value - change.before for value in together(change.values, change.before)]
        rule = self._settled.get(change.name) or self._rule(change, deltas)
        result = _combined(change.values[0], deltas, rule, self._weights)
        doubt = self._doubts.get(change.name)
        if doubt is not None:
            self._settle_doubt(change, doubt, deltas, result)
            if change.name in self._settled:
                result = result + doubt.owed
        return result

    def _rule(self, change: Change, deltas: Sequence[Any]) -> Rule:
        name, evidence = change.name, [e for e in change.evidence if e is not None]
        numbers = [number(delta) for delta in deltas]
        equal = all_equal(deltas)
        if not any(numbers) and equal:
            return "sum"
        if all(e.constant and e.count <= 1 and not e.looped for e in evidence):
            if equal:
                return self._settle(name, "once")
            if name not in self._doubts:
                self._tell_partial(name)
            return "sum"
        if equal:
            if not all(map(is_whole, numbers)):
                return self._settle(name, "once")
            return self._of_equal(change, numbers)
        return self._of_unequal(change, deltas, numbers)

    def _of_equal(self, change: Change, numbers: Sequence[float]) -> Rule:
        """Choose the rule for equal additions of a whole number: per sample or per step."""
        size, delta = (self.sizes[0] if self.sizes else 1), numbers[0]
        even = len(set(self.sizes)) <= 1
        if even and (delta == size or (size > 1 and not delta % size and delta != sum(self.sizes))):
            return "sum"  # so many for each sample
        looped = change.is_key and any(e is not None and e.looped for e in change.evidence)
        once = not (change.is_count or looped) and (not even or delta in (1, sum(self.sizes)))
        doubt = self._doubts.setdefault(
            change.name, _Doubt("once" if once else "sum", change.owner or change.name)
        )
        if change.owner not in self._counts:
            doubt.steps += 1 if even else 2
        return doubt.rule

    def _of_unequal(self, change: Change, deltas: Sequence[Any], numbers: Sequence[float]) -> Rule:
        name = change.name
        whole = all(map(is_whole, numbers))
        are_integers = all(map(is_integer, deltas))
        if are_integers:
            if change.is_key:
                self._counts.add(change.owner or name)
            return self._settle(name, "sum")
        if all(is_scalar(delta) for delta in deltas):
            matched = self._matched(numbers)
            if matched is not None:
                return self._settle(name, matched)
        if not whole:
            self._tell(
                name,
                "Ambiguous: the step adds numbers to `%s` that are not counts, and may be"
                " sums or means over samples. The replicas' numbers were summed, which is"
                " right for sums. Log a mean with `self.log`, or multiply it by the number of"
                " samples.",
            )
            return self._settle(name, "sum")
        return "sum"

    def _matched(self, numbers: Sequence[float]) -> Rule | None:
        """The rule for what is each shard's loss, or another value that it has logged."""
        candidates = self.references()
        if len(candidates) != len(numbers):
            return None
        for column in zip(*candidates, strict=False):
            if close(numbers, column):
                return "mean"
            if close(numbers, [c * size for c, size in zip(column, self.sizes, strict=True)]):
                return "sum"
        return None

    def _assigned(self, change: Change) -> Any:
        name, values = change.name, change.values
        scalars = all(map(is_scalar, values))
        if name in self._means and scalars:
            return self._mean(values)
        plain = all(isinstance(value, _CHEAP) for value in values)
        if name in self._lost or not (plain or self.is_due(name)):
            return values[0]
        if all_equal(values):
            if self._is_a_size(name, values[0]):
                self._tell(
                    name,
                    "The step appears to set `%s` to the number of samples in a shard; on one"
                    " device it is that of the whole batch. Set it in a hook such as"
                    " `on_train_batch_start`, which sees the whole batch.",
                )
            return values[0]
        if scalars:
            numbers = [number(value) for value in values]
            if not all(map(is_whole, numbers)) and self._matched(numbers) == "mean":
                self._means.add(name)
                return self._mean(values)
        self.lost(name, change.owner)
        return values[0]

    def _mean(self, values: Sequence[Any]) -> Any:
        total = sum(self._weights)
        parts = zip(together(values, values[0]), self._weights, strict=True)
        return sum(value * (weight / total) for value, weight in parts)

    def _is_a_size(self, name: str, value: Any) -> bool:
        """Return whether a value that all have assigned is their shards' size, not fixed."""
        if name in self._independent or not self.sizes:
            return False
        if isinstance(value, torch.Size):
            value = value[0] if len(value) else 0
        if isinstance(value, (bool, float)) or not is_number(value):
            return False
        if len(set(self.sizes)) > 1 or value != self.sizes[0]:
            self._independent.add(name)
            return False
        return self.sizes[0] > 1

    def _settle(self, name: str, rule: Rule) -> Rule:
        self._settled[name] = rule
        return rule

    def _settle_doubt(
        self, change: Change, doubt: _Doubt, deltas: Sequence[Any], result: Any
    ) -> None:
        """Keep what is owed if the doubt is decided otherwise, or see to it that it is paid."""
        name = change.name
        if doubt.value is not None and not all_equal([doubt.value, change.before]):
            doubt.owed = 0  # reset meanwhile
        settled = self._settled.get(name)
        if settled is None and doubt.steps >= _ENOUGH_STEPS:
            # What depends on data would have differed by now.
            settled = self._settle(name, "once")
        if settled is None:
            other: Rule = "sum" if doubt.rule == "once" else "once"
            otherwise = _combined(change.values[0], deltas, other, self._weights)
            doubt.owed = doubt.owed + (otherwise - result)
            doubt.value = copied(result)
            return
        if settled == doubt.rule:
            doubt.owed = 0
        elif doubt.steps >= _ENOUGH_STEPS:
            doubt.owed = doubt.owed + (
                _combined(change.values[0], deltas, settled, self._weights) - result
            )
        del self._doubts[name]

    def _tell_partial(self, name: str) -> None:
        self._tell(
            name,
            "The step counts in `%s` on some replicas and not on others, depending on the"
            " shard. The counts were summed, although one device may count once per step."
            " Count in a hook such as `on_train_batch_end`, which sees the whole batch.",
        )

    def _tell(self, name: str, text: str, owner: str = "") -> None:
        if (owner or name, text) not in self._told:
            self._told.add((owner or name, text))
            log.warning(text, name)


def _combined(first: Any, deltas: Sequence[Any], rule: Rule, weights: Sequence[float]) -> Any:
    """Join the first replica's value with entries that only others have."""
    if rule == "once":
        return first
    if rule == "sum":
        for delta in deltas[1:]:
            first = first + delta
        return first
    total = sum(weights) or 1
    mean = sum(delta * (weight / total) for delta, weight in zip(deltas, weights, strict=True))
    return first + (mean - deltas[0])
