"""Decide which parts of a batch have an entry per sample.

Arrays are told by their batch dimension. A list or tuple can be either of two things: *columns*, an
array per input, or *samples*, an entry per sample, whatever the entries are. Which of them is
decided by the rest of the batch, by earlier batches of the same structure and by what is known of
the DataLoader; what cannot be decided is an error. `docs/batches.md` has the rules as a table.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from torch.nn.utils.rnn import PackedSequence

from lightning_mgpu.engine.batch.containers import (
    has_rows,
    is_array,
    is_container,
    is_sequence,
    keeps_derived,
    leaves,
    rebuild,
)
from lightning_mgpu.engine.batch.graphs import graph_count, is_graph_batch
from lightning_mgpu.engine.batch.inspection import (
    check_leaf,
    cut_rows,
    lengths_of_outermost,
    lengths_of_sequences,
    may_be_samples,
    parts_below,
    signature,
)

Kind = Literal["columns", "samples", "whole"]
Dimensions = int | Mapping[Any, int]


@dataclass(frozen=True)
class Hint:
    """Knowledge about a batch from outside the batch itself.

    Attributes:
        sizes: The batch sizes of the DataLoaders that it may come from; the last batch of an epoch
            may be smaller.
        collated: Whether it was made by torch's own collation, which leaves no lists with a tensor
            per sample.
    """

    sizes: frozenset[int] = frozenset()
    collated: bool = False


class BatchLayout:
    """Layout of batches of one kind; remembers its decisions.

    Args:
        hint: Tells what else is known; called where a batch leaves a choice.
        dim: The batch dimension of arrays with that many dimensions, for all of them or by the key
            or position of the batch's parts; others have it first.

    Attributes:
        doubts: In words, what in the last batch may depend on the number of samples though it went
            whole to every part, and what may not be along the first dimension.
    """

    def __init__(self, hint: Callable[[], Hint] = Hint, dim: Dimensions = 0) -> None:
        self._hint = hint
        self._dim = dim
        self._known: dict[str, Kind] = {}
        self._kinds: dict[str, Kind] = {}
        self._measure = "batch"
        self._lasting: list[str] | None = None
        self.doubts: list[str] = []

    def read(self, batch: Any) -> int:
        """Decide for each part of a batch, and return the number of samples.

        Raises:
            ValueError: Nothing tells the number of samples, two parts disagree about it, something
                cannot be split, or it cannot be decided whether a list has an entry per sample.
        """
        self._kinds = {}
        size = self._size(batch)
        if self._lasting is None:
            self._lasting = list(self._transposed(batch, size))
        self.doubts = list(self._lasting)
        self._decide(batch, size, "batch", None)
        return size

    def cut(self, batch: Any, start: int, stop: int) -> Any:
        """Samples `start` to `stop` of the batch that was read last; arrays are views."""
        return self._cut(batch, start, stop, "batch", None)

    def kind(self, path: str) -> Kind | None:
        """Kind of a list in the batch that was read last; `None` if it has not been decided."""
        return self._kinds.get(path)

    def _dimension(self, value: Any, top: Any) -> int:
        """The batch dimension of an array below the part `top` of the batch."""
        dim = self._dim if isinstance(self._dim, int) else self._dim.get(top, 0)
        return dim if is_array(value) and dim < len(value.shape) else 0

    def _length(self, value: Any, top: Any) -> int:
        if is_graph_batch(value):
            return graph_count(value)
        return int(value.shape[self._dimension(value, top)])

    def _arrays(self, value: Any, path: str, top: Any) -> Iterator[tuple[str, int]]:
        """Every array with its length along the batch dimension."""
        if has_rows(value):
            yield path, self._length(value, top)
        for name, part, below in parts_below(value, top):
            yield from self._arrays(part, path + name, below)

    # The number of samples

    def _size(self, batch: Any) -> int:
        sure = list(self._sure(batch, "batch", None))
        if sure:
            self._measure, size = sure[0]
            for path, length in sure:
                if length != size:
                    raise ValueError(self._disagree(size, path, length))
            return size
        for path, leaf in leaves(batch):
            if isinstance(leaf, PackedSequence):
                check_leaf(leaf, path)
        arrays = list(self._arrays(batch, "batch", None))
        candidates = dict.fromkeys([n for _, n in arrays] + list(lengths_of_sequences(batch)))
        fitting = [n for n in candidates if self._fits(batch, n, "batch", None)]
        size = self._chosen(batch, fitting, arrays)
        self._measure = next((path for path, length in arrays if length == size), "batch")
        return size

    def _sure(self, value: Any, path: str, top: Any) -> Iterator[tuple[str, int]]:
        """Lengths that are the batch's for certain: nothing on the way to them leaves a choice."""
        if is_sequence(value):
            kind = self._known.get(path)
            if kind == "samples":
                yield path, len(value)
            if kind != "columns":
                return
        elif not is_container(value):
            check_leaf(value, path)
            if has_rows(value):
                yield path, self._length(value, top)
        for name, part, below in parts_below(value, top):
            yield from self._sure(part, path + name, below)

    def _fits(self, value: Any, size: int, path: str, top: Any) -> bool:
        """Return whether a batch of `size` samples may look like this."""
        if has_rows(value):
            return self._length(value, top) == size
        if is_sequence(value):
            known = self._known.get(path)
            if known == "whole" or (known != "columns" and may_be_samples(value, size)):
                return True
            if known == "samples":
                return False
        return all(
            self._fits(part, size, path + name, below)
            for name, part, below in parts_below(value, top)
        )

    def _chosen(self, batch: Any, fitting: list[int], arrays: list[tuple[str, int]]) -> int:
        """One of the sizes that a batch may have."""
        pure = [n for n in fitting if arrays and all(length == n for _, length in arrays)]
        if len(fitting) == 1 and fitting == pure:
            return fitting[0]
        hint = self._hint()
        if hint.collated:
            fitting = [n for n in fitting if self._fits_collated(batch, n, None)] or fitting
        expected = [n for n in fitting if n in hint.sizes]
        if len(expected) == 1:
            return expected[0]
        fitting = expected or fitting
        for n in pure:
            if n in fitting:
                return n
        # A batch whose outermost lists have an entry per sample is the rarer one.
        outermost = set(lengths_of_outermost(batch))
        inner = [n for n in fitting if n not in outermost]
        if len(inner) == 1:
            return inner[0]
        if not arrays and len(fitting) == 1:
            return fitting[0]
        self._refuse(batch, fitting, arrays)

    def _fits_collated(self, value: Any, size: int, top: Any) -> bool:
        if has_rows(value):
            return self._length(value, top) == size
        if is_sequence(value) and value and all(isinstance(e, (str, bytes)) for e in value):
            return len(value) == size
        return all(
            self._fits_collated(part, size, below) for _, part, below in parts_below(value, top)
        )

    def _refuse(self, batch: Any, fitting: list[int], arrays: list[tuple[str, int]]) -> NoReturn:
        for path, leaf in leaves(batch):
            check_leaf(leaf, path)
        for path, length in arrays:
            if length != arrays[0][1]:
                self._measure = arrays[0][0]
                raise ValueError(self._disagree(arrays[0][1], path, length))
        if fitting:
            raise ValueError(
                f"ambiguous: it may have {' or '.join(map(str, fitting))} samples, since lists"
                " in it may have an entry per sample, or an array per input."
            )
        raise ValueError(f"it has no tensor (a `{type(batch).__name__}`).")

    def _disagree(self, size: int, path: str, length: int) -> str:
        return (
            f"`{self._measure}` has {size} samples (its batch dimension), but `{path}` has"
            f" {length}."
        )

    def _transposed(self, batch: Any, size: int) -> Iterator[str]:
        """Arrays whose second dimension is what the DataLoader calls the batch, not the first."""
        sizes = self._hint().sizes - {1}
        if size in sizes or self._dim != 0:
            return
        for path, leaf in leaves(batch):
            if is_array(leaf) and len(leaf.shape) > 1 and leaf.shape[1] in sizes:
                yield (
                    f"`{path}` of shape {tuple(leaf.shape)} was split along its first dimension,"
                    f" but the DataLoader's batches have {leaf.shape[1]} samples"
                )

    # What each part is

    def _decide(self, value: Any, size: int, path: str, top: Any) -> None:
        if not is_container(value):
            self._check_array(value, size, path, top)
            return
        if keeps_derived(value):
            raise ValueError(
                f"`{path}` is a `{type(value).__name__}` that computes values from the whole"
                " batch when it is constructed, and cannot be reconstructed from a part of"
                " its fields."
            )
        if is_sequence(value):
            kind = self._kinds[path] = self._kind(value, size, path, top)
            if kind == "samples":
                self._check_samples(value, size, path)
            if kind != "columns":
                return
        for name, part, below in parts_below(value, top):
            self._decide(part, size, path + name, below)

    def _check_array(self, value: Any, size: int, path: str, top: Any) -> None:
        check_leaf(value, path)
        if has_rows(value):
            length = self._length(value, top)
            if length != size:
                raise ValueError(self._disagree(size, path, length))
        elif type(value) is int and value == size > 1:
            self.doubts.append(f"`{path}` is {size}, as many as there are samples")

    def _check_samples(self, value: Any, size: int, path: str) -> None:
        if len(value) != size:
            raise ValueError(
                f"`{path}` had an entry per sample so far, but has {len(value)} entries in a batch"
                f" of {size} samples."
            )
        if size == 1 and not is_container(entry := next(iter(value))):
            check_leaf(entry, f"{path}[0]")

    def _kind(self, value: Any, size: int, path: str, top: Any) -> Kind:
        known = self._known.get(path)
        if known is not None:
            return known
        has_arrays = any(True for _ in self._arrays(value, path, top))
        samples = may_be_samples(value, size)
        if has_arrays:
            below = parts_below(value, top)
            columns = all(self._fits(part, size, path + name, key) for name, part, key in below)
        elif samples:  # texts for each input, or for each sample
            columns = size > 1 and all(is_sequence(part) and len(part) == size for part in value)
        else:
            columns = any(size in lengths_of_sequences(part) for part in value)
        if columns and samples:
            return self._ambiguous(value, path)
        if not columns and not samples:
            if has_arrays:
                return "columns"  # and the array that does not fit is named
            return self._remember(path, "whole") if value else "whole"
        return self._remember(path, "columns" if columns else "samples")

    def _remember(self, path: str, kind: Kind) -> Kind:
        self._known[path] = kind
        return kind

    def _ambiguous(self, value: Any, path: str) -> Kind:
        """Kind of a list with as many entries as samples, each of which is as long as that."""
        targets = path != "batch" and all(isinstance(entry, Mapping) for entry in value)
        if len(value) == 1:  # it makes no difference, as there is one shard
            return "samples" if targets else "columns"
        if self._hint().collated or len({signature(entry) for entry in value}) > 1:
            return "columns"
        if targets:  # such as those beside a batch of images
            return "samples"
        if path == "batch" and len(value) == 2 and all(map(is_array, value)):
            return "columns"  # input and target
        raise ValueError(
            f"ambiguous: `{path}` has {len(value)} entries of that length, as many as samples:"
            " an entry per sample, or an array per input. Stack it into a tensor, or make it"
            " a dict of columns."
        )

    # Cutting

    def _cut(self, value: Any, start: int, stop: int, path: str, top: Any) -> Any:
        kind = self._kinds.get(path)
        if kind == "samples":
            return rebuild(value, list(value)[start:stop])
        if kind == "whole":
            return value
        if has_rows(value):
            return cut_rows(value, self._dimension(value, top), start, stop)
        if not is_container(value):
            return value
        below = parts_below(value, top)
        return rebuild(value, [self._cut(p, start, stop, path + n, key) for n, p, key in below])
