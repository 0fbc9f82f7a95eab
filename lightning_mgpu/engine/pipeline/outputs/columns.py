"""The outputs of micro-batches side by side, place by place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mgpu.engine.batch.containers import is_sequence, rebuild
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.outputs.joining import ENTRIES, Layouts
from lightning_mgpu.engine.pipeline.outputs.object_structure import inner, refilled


@dataclass(frozen=True)
class Column:
    """Values of all parts at one place of the output.

    Attributes:
        place: The place, such as ``output['logits']``.
        values: Of each part: a leaf, or a list.
        entries: Whether they are lists with an entry per sample.
    """

    place: str
    values: tuple[Any, ...]
    entries: bool = False


def columns_of(
    parts: Sequence[Any], counts: Sequence[int], path: str, layouts: Layouts | None = None
) -> list[Column]:
    """Values of the parts at each place of the output.

    Args:
        parts: Of each micro-batch.
        counts: Samples in each.
        path: What to call them.
        layouts: Where the batch lies in the output, as far as that has been found out.

    Raises:
        SplitError: They are not of one structure.
    """
    if _are_entries(parts, counts, path, layouts):
        return [Column(path, tuple(parts), entries=True)]
    below = [inner(part, path) for part in parts]
    if all(found is None for found in below):
        return [Column(path, tuple(parts))]
    names = [None if found is None else [name for name, _ in found] for found in below]
    if any(other != names[0] for other in names):
        raise SplitError(
            f"`{path}`: the module returns a different structure for each micro-batch of"
            f" {list(counts)} samples. Return tensors or lists with an entry per sample, or"
            " build it in the step."
        )
    found = zip(*(pairs or () for pairs in below), strict=True)
    return [
        column
        for pairs in found
        for column in columns_of([part for _, part in pairs], counts, pairs[0][0], layouts)
    ]


def merged(parts: Sequence[Any], columns: Sequence[Column], path: str) -> Any:
    """Join the structures of the parts, without their leaves."""
    of_entries = {column.place: column for column in columns if column.entries}
    return _merged(parts[0], of_entries, path) if of_entries else parts[0]


def _merged(value: Any, of_entries: Mapping[str, Column], path: str) -> Any:
    if path in of_entries:
        return rebuild(value, [entry for part in of_entries[path].values for entry in part])
    below = inner(value, path)
    if below is None:
        return value
    return refilled(value, [_merged(part, of_entries, name) for name, part in below])


def _are_entries(
    parts: Sequence[Any], counts: Sequence[int], path: str, layouts: Layouts | None
) -> bool:
    """Return whether the parts are lists with an entry per sample."""
    if not all(is_sequence(part) and len(part) == n for part, n in zip(parts, counts, strict=True)):
        return False
    return len(set(counts)) > 1 or (layouts or {}).get(path) == ENTRIES


def same(parts: Sequence[Any], counts: Sequence[int], path: str, *, proven: bool = False) -> Any:
    """Return a value that is no tensor and must be the same for every micro-batch.

    Args:
        parts: Of each micro-batch.
        counts: Samples in each.
        path: What to call it.
        proven: Whether it is known not to be the number of samples.

    Raises:
        SplitError: It is not.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    may_count = type(first) is int and set(counts) == {first} and not proven
    if all(map(_Equal(first), parts)) and not may_count:
        return first
    if isinstance(first, (str, bytes, bool, int, float, complex)):
        text = f"returns {list(parts)!r}, one"
    else:
        text = f"returns an object, a `{type(first).__name__}`,"
    raise SplitError(
        f"`{path}`: the module {text} for each micro-batch of {list(counts)} samples, which"
        " cannot be joined. Return tensors with an entry per sample, or do not return it (for"
        " a key-value cache: `use_cache=False`)."
    )


class _Equal:
    def __init__(self, first: Any) -> None:
        self._first = first

    def __call__(self, other: Any) -> bool:
        if type(other) is not type(self._first):
            return False
        try:
            return bool(other is self._first or other == self._first)
        except Exception:  # arrays, or objects that cannot be compared
            return False
