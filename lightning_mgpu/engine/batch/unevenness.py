"""Samples of different sizes, which a module may pad to the largest beside them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_sequence, leaves, sequences

_Sizes = list[tuple[int, ...]]

# Of a large batch, the first samples will do.
_LOOKED_AT = 32


class Window(NamedTuple):
    """Some neighbouring samples, in two parts.

    Attributes:
        start: The first sample.
        middle: The first of the second part.
        end: The one after the last.
        uneven: In what the parts differ: the largest or smallest size of lists, or of something in
            their entries.
    """

    start: int
    middle: int
    end: int
    uneven: frozenset[str] = frozenset()

    @property
    def counts(self) -> list[int]:
        """Samples in each part."""
        return [self.middle - self.start, self.end - self.middle]


def telling(pieces: Mapping[str, Any], window: Window, least: int) -> Window:
    """Neighbours of which one part would be padded to another size than the other.

    Args:
        pieces: Lists with an entry per sample, by name; others are passed over.
        window: What to take if there are none; others are no longer than this one.
        least: The least samples in a part.

    Returns:
        The longest of those whose parts differ in most.
    """
    lists = {name: piece for name, piece in pieces.items() if is_sequence(piece)}
    columns = [
        column
        for name, piece in lists.items()
        for column in _sizes(name, piece)
        if len(set(column[1])) > 1
    ]
    samples = min((len(sizes) for _, sizes in columns), default=0)
    samples = min(samples, _LOOKED_AT)
    for total in range(window.end - window.start, 2 * least - 1, -1):
        for start in range(samples - total + 1):
            for middle in range(start + least, start + total - least + 1):
                found = Window(start, middle, start + total, _uneven(columns, start, middle, total))
                if len(found.uneven) > len(window.uneven):
                    window = found
                if len(window.uneven) == 2 * len(columns):
                    return window
    return window


def differing(shards: Sequence[Any]) -> frozenset[str]:
    """Lists in the parts of a batch, or places in their entries, that differ from part to part.

    Args:
        shards: The parts, of one structure.

    Returns:
        Those of which the largest or smallest tensors of two parts are not of a size.
    """
    found: dict[str, set[Any]] = {}
    for shard in shards:
        columns = [column for name, piece in sequences(shard) for column in _sizes(name, piece)]
        for name, sizes in columns:
            found.setdefault(name, set()).add((_extreme(max, sizes), _extreme(min, sizes)))
    return frozenset(name for name, extremes in found.items() if len(extremes) > 1)


def _uneven(
    columns: Sequence[tuple[str, _Sizes]], start: int, middle: int, total: int
) -> frozenset[str]:
    return frozenset(
        f"{which.__name__} {name}"
        for name, sizes in columns
        for which in (max, min)
        if _extreme(which, sizes[start:middle]) != _extreme(which, sizes[middle : start + total])
    )


def _sizes(name: str, piece: Sequence[Any]) -> list[tuple[str, _Sizes]]:
    """The shapes of the tensors at each place of the entries that all of them have."""
    entries = [
        {n: tuple(leaf.shape) for n, leaf in leaves(entry, name) if isinstance(leaf, Tensor)}
        for entry in piece
    ]
    places = [name for name in (entries or [{}])[0] if all(name in entry for entry in entries)]
    return [(place, [entry[place] for entry in entries]) for place in places]


def _extreme(which: Callable[..., int], sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len({len(size) for size in sizes}) > 1:
        return ()
    return tuple(map(which, zip(*sizes, strict=True)))
