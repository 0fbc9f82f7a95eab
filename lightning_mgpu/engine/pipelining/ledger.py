"""What the stages of a pipeline hand on and keep for backward, counted while they run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu.engine.pipelining import values
from lightning_mgpu.engine.pipelining.arguments import Call
from lightning_mgpu.engine.pipelining.cutter import Cut, Cutter
from lightning_mgpu.engine.pipelining.partition import Partition, Stage

__all__: list[str] = []

CALLER = -1


class Holders(NamedTuple):
    """Who has to do with a piece of memory.

    Attributes:
        keepers: The stages whose backward needs it.
        producer: The stage that makes it for others, `CALLER`, or `None` if it is for no other.
        consumers: The stages that others made it for; `CALLER` among them.
    """

    keepers: frozenset[int]
    producer: int | None
    consumers: frozenset[int]


class Ledger:
    """The bytes of all that a forward pass makes.

    Args:
        own: Tensors that belong to the model, which do not count.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_memory(tensor) for tensor in own}
        self._batch: set[int] = set()
        self._entries: dict[int, _Entry] = {}

    def total(self) -> dict[Holders, int]:
        """The bytes, by who holds them."""
        found: dict[Holders, int] = {}
        for entry in self._entries.values():
            who = Holders(frozenset(entry.keepers), entry.producer, frozenset(entry.consumers))
            found[who] = found.get(who, 0) + entry.size
        return found

    def observed(self, partition: Partition) -> Partition:
        """The same stages, which write down here what they do."""
        stages = [
            replace(stage, compute=partial(self._compute, partition, stage))
            for stage in partition.stages
        ]
        return replace(partition, stages=tuple(stages))

    def _compute(self, partition: Partition, stage: Stage, inputs: Sequence[Any]) -> Sequence[Any]:
        for name, value in zip(stage.inputs, inputs, strict=True):
            for tensor in values.tensors(value):
                if name in partition.arguments:
                    self._batch.add(_memory(tensor))
                    self._made(tensor, CALLER)
                self._entry(tensor).consumers.add(stage.index)

        def pack(tensor: Tensor) -> Tensor:
            self._entry(tensor).keepers.add(stage.index)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = stage.compute(inputs)
        for name, value in zip(stage.outputs, outputs, strict=True):
            for tensor in values.tensors(value):
                self._made(tensor, stage.index)
                if name in partition.results:
                    self._entry(tensor).consumers.add(CALLER)
        return outputs

    def _made(self, tensor: Tensor, producer: int) -> None:
        entry = self._entry(tensor)
        if entry.producer is None:
            entry.producer = producer

    def _entry(self, tensor: Tensor) -> "_Entry":
        key = _memory(tensor)
        if key in self._own:
            return _Entry()
        if key in self._batch:
            key = tensor.data_ptr()  # micro-batches are views of one memory
        entry = self._entries.setdefault(key, _Entry())
        size = tensor.nbytes
        entry.size = max(entry.size, min(tensor.untyped_storage().nbytes(), size))
        return entry


@dataclass
class _Entry:
    size: int = 0
    keepers: set[int] = field(default_factory=set)
    producer: int | None = None
    consumers: set[int] = field(default_factory=set)


class ObservedCutter(Cutter):
    """A cutter whose stages write down what they do, while there is a ledger.

    Its arguments are those of `Cutter`.
    """

    ledger: Ledger | None = None

    def observe(self) -> Ledger:
        """Begin a ledger."""
        roots: list[nn.Module] = self.roots
        own = [t for root in roots for t in (*root.parameters(), *root.buffers())]
        self.ledger = Ledger(own)
        return self.ledger

    def __call__(self, call: Call) -> Cut:
        """As `Cutter`."""
        cut = super().__call__(call)
        if self.ledger is None:
            return cut
        return replace(cut, partition=self.ledger.observed(cut.partition))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
