"""Share the in-memory results of `prepare_data` with ranks that have not called it.

Lightning calls `prepare_data` once a node, or once in all. On one device, whatever it sets on the
module or DataModule is there for the hooks that follow; so it has to be on every rank.
"""

import logging
import pickle
import random
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mgpu._compat.torch import version_of
from lightning_mgpu.errors import one_line
from lightning_mgpu.ray.trainer_state import dump, load, own_objects
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)

# Longer containers are compared by the identity of their entries alone.
_LOOKED_INTO = 10_000


def share_next(trainer: "Trainer") -> None:
    """Make the trainer's next `prepare_data` reach all ranks, all of which call this."""
    owners = [trainer.datamodule, trainer.lightning_module]  # type: ignore[attr-defined]
    per_node = {
        bool(owner.prepare_data_per_node)
        for owner in owners
        if owner is not None and is_overridden("prepare_data", owner)
    }
    if trainer.world_size == 1 or not per_node:
        return
    connector: Any = trainer._data_connector
    original: Callable[[], None] = connector.prepare_data

    def prepare_data() -> None:
        del connector.prepare_data
        before = _State(own_objects(trainer, callbacks_of(trainer)))
        original()
        _share(before, trainer.local_rank, per_node)

    connector.prepare_data = prepare_data


@dataclass(frozen=True)
class _Changes:
    """Changes made by one rank's `prepare_data`.

    Attributes:
        attributes: Pickled values by owner and name; they refer to what both sides have.
        gone: Owners and names of attributes that have been deleted.
        tensors: Parameters and buffers that have been written to.
        generators: States of the random generators and, to be told from others, those before.
    """

    attributes: bytes
    gone: list[tuple[str, str]]
    tensors: dict[str, torch.Tensor]
    generators: tuple[bytes, bytes] | None


class _State:
    """Snapshot of a Trainer's modules and DataModule, to find changes."""

    def __init__(self, here: dict[str, Any]) -> None:
        self.here = here
        self.owners = {
            name: obj
            for name, obj in here.items()
            if isinstance(obj, (torch.nn.Module, LightningDataModule))
        }
        self._own = {id(obj) for obj in here.values()}
        self._seen = {name: self._look(vars(owner)) for name, owner in self.owners.items()}
        self._versions = {name: version_of(tensor) for name, tensor in self._tensors().items()}
        self._generators = _generators()

    def changes(self) -> _Changes | None:
        """Changes since the snapshot; `None` if there are none."""
        changed: dict[tuple[str, str], Any] = {}
        gone = []
        for owner_name, owner in self.owners.items():
            before, now = self._seen[owner_name], self._look(vars(owner))
            gone += [(owner_name, name) for name in before.keys() - now.keys()]
            for name, seen in now.items():
                if name not in before or before[name].marks != seen.marks:
                    changed[owner_name, name] = vars(owner)[name]
        tensors = {
            name: tensor.detach()
            for name, tensor in self._tensors().items()
            if version_of(tensor) != self._versions[name]
        }
        drawn = self._generators != (generators := _generators())
        if not (changed or gone or tensors or drawn):
            return None
        states = (self._generators, generators) if drawn else None
        return _Changes(self._dump(changed), gone, tensors, states)

    def apply(self, changes: _Changes) -> None:
        """Apply the changes in this process."""
        for (owner_name, name), value in load(changes.attributes, self.here).items():
            vars(self.owners[owner_name])[name] = value
        for owner_name, name in changes.gone:
            vars(self.owners[owner_name]).pop(name, None)
        tensors = self._tensors()
        with torch.no_grad():
            for name, tensor in changes.tensors.items():
                tensors[name].copy_(tensor)
        # Ranks that draw numbers of their own go on doing so.
        if changes.generators is not None and changes.generators[0] == self._generators:
            _set_generators(changes.generators[1])

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: obj for name, obj in self.here.items() if isinstance(obj, torch.Tensor)}

    def _look(self, attributes: dict[str, Any]) -> "dict[str, _Seen]":
        return {name: _Seen(value, self._own) for name, value in attributes.items()}

    def _dump(self, changed: dict[tuple[str, str], Any]) -> bytes:
        names = {id(obj): name for name, obj in self.here.items()}
        with suppress(Exception):
            return dump(changed, names)
        sent = {}
        for (owner_name, name), value in changed.items():
            try:
                dump(value, names)
            except Exception as error:
                log.warning(
                    "`prepare_data` sets `%s.%s`, which cannot be pickled (%s). The ranks"
                    " that do not call `prepare_data` do not get it: set it in `setup`.",
                    type(self.owners[owner_name]).__name__,
                    name,
                    one_line(error, 200),
                )
            else:
                sent[owner_name, name] = value
        return dump(sent, names)


@dataclass
class _Seen:
    """Identity of a value and all that it holds, valid while this object lives."""

    value: Any
    own: set[int]
    marks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._kept: dict[int, Any] = {}
        pending = [self.value]
        while pending:
            part = pending.pop()
            self.marks.append(id(part))
            if id(part) in self.own or id(part) in self._kept:
                continue
            self._kept[id(part)] = part
            if isinstance(part, torch.Tensor):
                self.marks.append(version_of(part))
            elif isinstance(part, np.ndarray) and part.dtype != object:
                self.marks.append(zlib.crc32(np.ascontiguousarray(part).tobytes()))
            else:
                pending += self._entries(part)

    def _entries(self, part: Any) -> Iterable[Any]:
        if isinstance(part, (type, str, bytes, int, float)) or callable(part):
            return ()
        entries = [*vars(part).values()] if hasattr(part, "__dict__") else []
        if isinstance(part, dict):
            entries += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            entries += part
        if len(entries) <= _LOOKED_INTO:
            return entries
        self._kept[id(entries)] = entries
        self.marks.append([id(entry) for entry in entries])
        return ()


def _share(state: _State, local_rank: int, per_node: set[bool]) -> None:
    """Send what some ranks have prepared to the others.

    Args:
        state: Of this rank, from before.
        local_rank: Of this rank.
        per_node: `prepare_data_per_node` of the module and DataModule, as far as they prepare.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = rank - local_rank  # neighbours have neighbouring ranks
    firsts: list[Any] = [None] * world_size
    dist.all_gather_object(firsts, mine)
    for first in sorted({0, *firsts}):
        box = [pickle.dumps(state.changes()) if rank == first else None]
        dist.broadcast_object_list(box, first)
        for_all, for_node = first == 0 and False in per_node, first == mine and True in per_node
        changes = pickle.loads(box[0] or b"")
        if changes is not None and rank != first and (for_all or for_node):
            state.apply(changes)


def _generators() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


def _set_generators(state: bytes) -> None:
    python, numpy, ours = pickle.loads(state)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(ours))
