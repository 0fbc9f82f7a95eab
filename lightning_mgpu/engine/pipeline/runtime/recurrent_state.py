"""Restore state that modules keep between calls of `forward`, for recomputation."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import BLANK, WEIGHTS, buffers_of

_MISSING = object()
# A place: the dict that holds it and its key.
_Place = tuple[dict[str, Any], str]


class Moment(NamedTuple):
    """Snapshot of some attributes and buffers at one time.

    Attributes:
        held: By the dict's `id`: the dict and what was in it.
        copies: Of tensors that are written to in place.
        contents: Lists, dicts and sets, each with what was in it.
    """

    held: list[tuple[dict[str, Any], dict[str, Any]]]
    copies: list[tuple[_Place, Tensor]]
    contents: list[tuple[Any, Any]]


class Memory:
    """Buffers, counters and caches of a stage's modules.

    Args:
        modules: The modules, with all that they contain.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = {id(inner): inner for module in modules for inner in module.modules()}
        self._modules = list(found.values())
        # Places of tensors that `forward` writes to in place, once that is known.
        self._written: set[tuple[int, str]] | None = None

    def before(self) -> Moment:
        """Snapshot before a micro-batch is computed, to be passed to `after`."""
        return Moment(self._held(), self._copies(), self._contents())

    def after(self, before: Moment) -> Moment:
        """Former values of everything that the micro-batch has changed."""
        held = []
        for holder, entries in before.held:
            changed = {key: entries.get(key, _MISSING) for key in {**entries, **holder}}
            changed = {k: v for k, v in changed.items() if holder.get(k, _MISSING) is not v}
            if changed:
                held.append((holder, changed))
        copies = [(p, copy) for p, copy in before.copies if not _is_same(p[0].get(p[1]), copy)]
        if self._written is None:
            self._written = {(id(holder), key) for (holder, key), _ in copies}
        contents = [(c, kept) for c, kept in before.contents if not _holds(c, kept)]
        return Moment(held, copies, contents)

    @contextmanager
    def rewound(self, moment: Moment) -> Iterator[None]:
        """Context to recompute a micro-batch from its state of the first time; leaves no trace.

        Args:
            moment: What `after` returned then.
        """
        now = Moment(self._held(), [], self._contents())
        for holder, entries in moment.held:
            _put(holder, entries)
        for (holder, key), copy in moment.copies:
            holder[key] = copy.clone()  # written to instead of the tensor of today
        for container, kept in moment.contents:
            _fill(container, kept)
        try:
            yield
        finally:
            for holder, entries in now.held:
                if len(holder) != len(entries):
                    for key in [key for key in holder if key not in entries]:
                        del holder[key]
                _put(holder, entries)
            for container, kept in now.contents:
                _fill(container, kept)

    def _held(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        holders = (h for module in self._modules for h in (vars(module), buffers_of(module)))
        return [(holder, dict(holder)) for holder in holders]

    def _copies(self) -> list[tuple[_Place, Tensor]]:
        found = []
        for module in self._modules:
            for holder in (buffers_of(module), vars(module)):
                for key, value in holder.items():
                    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                        continue
                    if self._written is None or (id(holder), key) in self._written:
                        found.append(((holder, key), value.detach().clone()))
        return found

    def _contents(self) -> list[tuple[Any, Any]]:
        return [
            (value, value.copy())
            for module in self._modules
            for key, value in vars(module).items()
            if type(value) in (list, dict, set) and key not in _OWN
        ]


_OWN = BLANK | {WEIGHTS}
"""What torch itself keeps in every module."""


def _put(holder: dict[str, Any], entries: dict[str, Any]) -> None:
    for key, value in entries.items():
        if value is _MISSING:
            holder.pop(key, None)
        elif holder.get(key, _MISSING) is not value:
            holder[key] = value


def _holds(container: Any, kept: Any) -> bool:
    if len(container) != len(kept):
        return False
    if isinstance(container, dict):
        return all(key in kept and kept[key] is value for key, value in container.items())
    if isinstance(container, set):
        return bool(container == kept)
    return all(a is b for a, b in zip(container, kept, strict=True))


def _fill(container: Any, kept: Any) -> None:
    if _holds(container, kept):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(kept)
    else:
        container.update(kept)


def _is_same(value: Any, copy: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == copy.shape and torch.equal(value, copy)


def memories(modules: Sequence[Sequence[nn.Module]]) -> list[Memory]:
    """Memory of each stage."""
    return [Memory(of_stage) for of_stage in modules]
