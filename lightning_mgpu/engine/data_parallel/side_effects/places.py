"""Entries of a dict, or attributes, of the replicas side by side."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mgpu.engine.data_parallel.copying.remap import LONG_DICT
from lightning_mgpu.engine.data_parallel.side_effects.equality import MISSING


class Places:
    """The entries of one dict, or the attributes of one object, on all replicas.

    Args:
        target: The master's now.
        was: The master's at the start of the step.
        nows: The others' now.
        befores: The others' at the start of the step.
        where: What they are the entries of.
        is_dict: Whether it is a dict rather than attributes.
        counts: Whether all numbers in it are counts.
    """

    def __init__(
        self,
        target: dict[Any, Any],
        was: Mapping[Any, Any],
        nows: Sequence[Mapping[Any, Any]],
        befores: Sequence[Mapping[Any, Any]],
        where: str,
        is_dict: bool = False,
        counts: bool = False,
    ) -> None:
        self.target, self.was, self.nows, self.befores = target, was, nows, befores
        self.is_dict, self.counts = is_dict, counts
        self._where = where

    def name(self, key: Any) -> str:
        """Name of a key's place in messages."""
        return f"{self._where}[{key!r}]" if self.is_dict else f"{self._where}.{key}"

    def owner(self, key: Any) -> str:
        """Name under which warnings about a key are given once."""
        return self._where if self.is_dict else self.name(key)

    def is_long(self) -> bool:
        """Return whether it is a dict with too many entries to track its numbers."""
        return self.is_dict and len(self.was) > LONG_DICT

    def changed(self) -> list[Any]:
        """Keys whose value any replica has changed."""
        keys: dict[Any, None] = {}
        for now, before in ((self.target, self.was), *zip(self.nows, self.befores, strict=True)):
            same = len(now) == len(before) and all(map(operator.is_, now.values(), before.values()))
            if not same:
                for key, value in now.items():
                    if value is not before.get(key, MISSING):
                        keys[key] = None
        return list(keys)

    def as_counts(self) -> "Places":
        """Return the same places of a `Counter`, where missing keys count zero."""
        for key in dict.fromkeys(key for now in self.nows for key in now):
            self.target.setdefault(key, 0)
        keys = [*self.target]
        self.was, *self.befores = (
            {key: held.get(key, 0) for key in keys} for held in (self.was, *self.befores)
        )
        self.nows = [{key: now.get(key, 0) for key in keys} for now in self.nows]
        self.counts = True
        return self
