"""Samples of different sizes, which a module may pad to the largest beside them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_mgpu.engine.batch.containers import is_sequence, leaves

__all__: list[str] = []


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
    columns = [column for name, piece in lists.items() for column in _sizes(name, piece)]
    samples = min((len(sizes) for _, sizes in columns), default=0)
    for total in range(window.end - window.start, 2 * least - 1, -1):
        for start in range(samples - total + 1):
            for middle in range(start + least, start + total - least + 1):
                found = Window(start, middle, start + total, _uneven(columns, start, middle, total))
                if len(found.uneven) > len(window.uneven):
                    window = found
    return window


def _uneven(
    columns: Sequence[tuple[str, list[tuple[int, ...]]]], start: int, middle: int, total: int
) -> frozenset[str]:
    return frozenset(
        f"{which.__name__} {name}"
        for name, sizes in columns
        for which in (max, min)
        if _extreme(which, sizes[start:middle]) != _extreme(which, sizes[middle : start + total])
    )


def _sizes(name: str, piece: Sequence[Any]) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The shapes of the tensors at each place of the entries that all of them have."""
    entries = [
        {
            place: tuple(leaf.shape)
            for place, leaf in leaves(entry, name)
            if isinstance(leaf, Tensor)
        }
        for entry in piece
    ]
    places = [place for place in entries[0] if all(place in entry for entry in entries)]
    columns = [(place, [entry[place] for entry in entries]) for place in places]
    return [(place, sizes) for place, sizes in columns if len(set(sizes)) > 1]


def _extreme(which: Callable[..., int], sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if len({len(size) for size in sizes}) > 1:
        return ()
    return tuple(map(which, zip(*sizes, strict=True)))
