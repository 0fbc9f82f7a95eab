"""Batches of an epoch that can go on where an earlier run has stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from lightning_mgpu._compat.lightning import CombinedLoader, sized_len
from lightning_mgpu._compat.lightning_data import samplers_of
from lightning_mgpu._compat.lightning_loaders import postpone
from lightning_mgpu.engine.random_state import RandomState


@dataclass
class Position:
    """Where an epoch's batches are to go on.

    Attributes:
        start: The states of random number generators before the epoch's batches began.
        first: The same before the first batch was fetched: hooks may have drawn since.
        ahead: The same before the batch was fetched that is next, if that was done.
        used: How many batches have been trained.
        fetched: How many have been fetched for that, prefetched ones included.
    """

    start: RandomState
    first: RandomState
    ahead: RandomState | None
    used: int
    fetched: int


class ResumableLoader(CombinedLoader):
    """Combined loader that begins an epoch as it once began, and leaves out what has been used.

    What is left out is fetched all the same, since augmentations in worker processes draw from
    generators of theirs. Nothing is fetched before the first batch is asked for: samplers are told
    the epoch, and hooks are called, after Lightning has asked for an iterator.

    Args:
        iterables: The loaders, or a collection of them.
        mode: How they are combined.
        devices: Accelerators whose generators count.
        settle: Called when all that a run draws after the interruption is about to follow.
        is_settled: Tells whether it has been called by somebody else.
    """

    def __init__(
        self,
        iterables: Any,
        mode: Any,
        devices: list[torch.device],
        settle: Callable[[], None],
        is_settled: Callable[[], bool],
    ) -> None:
        super().__init__(iterables, mode)
        self._cycles = mode == "max_size_cycle"
        self._devices, self._settle, self._is_settled = devices, settle, is_settled
        self._waits, self._settles_at, self._has_no_end = False, -1, False
        self._idle_iterators = 0
        self.position: Position | None = None
        """Where to go on; set before the first batch is asked for."""
        self._own: list[torch.Generator] = []
        self.start = self.first = self._now()
        self.ahead: RandomState | None = None
        """As in `Position`, of the epoch at hand."""
        self.fetched = 0
        """How many batches of the epoch have been fetched."""

    @property
    def keeps_place(self) -> bool:
        """Return whether the loaders know by themselves where they are (`StatefulDataLoader`)."""
        return all(_keeps_place(loader) for loader in self.flattened)

    @property
    def has_cycles(self) -> bool:
        """Return whether a loader is shorter than another, and is begun anew within the epoch."""
        lengths = {sized_len(loader) for loader in self.flattened}
        return self._cycles and len(lengths) > 1

    def wait(self) -> None:
        """Start nothing until the first batch of the coming iterator is asked for."""
        self._waits = True

    def idle(self) -> None:
        """Start nothing for the coming iterator: nobody trains with it, and another follows."""
        self._idle_iterators = 2

    @override
    def __iter__(self) -> "ResumableLoader":
        self._idle_iterators = max(0, self._idle_iterators - 1)
        if self._waits or self._idle_iterators:
            postpone(self)
        else:
            self._begin()
        return self

    @override
    def __next__(self) -> Any:
        if self._idle_iterators:
            return self._any_batch()
        if self._waits:
            self._waits = False
            self._go_on()
        if self.fetched == self._settles_at:
            self._settles_at = -1
            self._settle()
        if self.fetched == 0:
            self.first = self._now()
        if self._has_no_end:
            self.ahead = self._now()  # (Lightning fetches one more to know whether there is one)
        batch = super().__next__()
        self.fetched += 1
        return batch

    def generators(self) -> list[torch.Generator]:
        """Generators that the program has given to its loaders and samplers."""
        return list({id(g): g for loader in self.flattened for g in _generators(loader)}.values())

    def _now(self) -> RandomState:
        return RandomState(self._devices, self._own)

    def _begin(self) -> None:
        self._own = self.generators()
        self.start, self.ahead = self._now(), None
        self._has_no_end = None in map(sized_len, self.flattened)
        super().__iter__()
        self.fetched = 0

    def _any_batch(self) -> Any:
        self._own = self.generators()
        now = self._now()
        super().__iter__()
        batch = super().__next__()
        now.restore(self._own)
        return batch

    def _go_on(self) -> None:
        position, self.position = self.position, None
        if position is None:
            self._settle()
            self._begin()
            return
        self._own = self.generators()
        now = self._now()
        position.start.restore(self._own)
        self._begin()
        position.first.restore(self._own)
        self.first = position.first
        if not self.keeps_place:
            for _ in range(position.used):
                super().__next__()
        self.fetched = position.used
        if position.ahead is not None and position.fetched > position.used:
            position.ahead.restore(self._own)
        if self._is_settled():
            now.restore(self._own)
        else:
            self._settles_at = position.fetched


def _keeps_place(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _generators(loader: Any) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for part in (loader, *samplers_of(loader))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
