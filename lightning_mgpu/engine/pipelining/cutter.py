"""Decides where a module is cut, once, and cuts it for each kind of call."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.pipelining import balance
from lightning_mgpu.engine.pipelining.arguments import Call, Same
from lightning_mgpu.engine.pipelining.graph_cut import layers, partition, untied
from lightning_mgpu.engine.pipelining.measure import Cost, measure
from lightning_mgpu.engine.pipelining.memory import Memory, memories
from lightning_mgpu.engine.pipelining.partition import (
    Partition,
    PartitionError,
    Stage,
    ancestors,
    canonical,
    chain,
)
from lightning_mgpu.engine.pipelining.trace import Input, UntraceableError

__all__: list[str] = []

Balance = Sequence[int] | Literal["parameters", "time", "memory"]

# What a parameter takes beside itself: its gradient, and two moments in the optimizer.
_COPIES_OF_PARAMETERS = 4

# Calls that differ in more than their tensors have partitions of their own; the oldest are dropped.
_MAX_PARTITIONS = 32
_ATOMS = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class Cut:
    """A partition, and the modules that each of its stages runs.

    Attributes:
        partition: The stages.
        modules: Of each stage.
        layers: Layers of each stage that keep running statistics.
        tensors: Parameters and buffers of each stage, by name.
        memories: What the modules of each stage remember.
    """

    partition: Partition
    modules: list[list[nn.Module]]
    layers: list[list[nn.Module]]
    tensors: list[dict[str, Tensor]]
    memories: list[Memory]


class Cutter:
    """Cuts a module into stages, always at the same submodules.

    Args:
        module: The module.
        forward: Its own `forward`.
        stages: How many.
        split_at: Names of the submodules at which the second and later stages begin.
        balanced: Without `split_at`: layers in each stage, or what to balance.
        made: Stages that the user has made; nothing is cut then.

    Raises:
        PartitionError: A name is unknown, or there are too few or too many.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        stages: int,
        split_at: Sequence[str] | None = None,
        balanced: Balance = "parameters",
        made: Sequence[nn.Module] | None = None,
    ) -> None:
        self.module, self.forward, self.stages = module, forward, stages
        self._balanced, self._made = balanced, made
        self.cuts: list[str] | None = None
        """Where stages begin, once that is known."""
        self.costs: dict[str, Cost] = {}
        """Of each layer, if they have been measured."""
        if split_at is not None:
            _check_count("split_at", len(split_at) + 1, stages, f"{stages - 1} names")
            self.cuts = [canonical(module, name) for name in split_at]
        elif made is not None:
            _check_count("configure_pipeline", len(made), stages, f"{stages} modules")
        elif not isinstance(balanced, str):
            _check_count("balance", len(balanced), stages, f"{stages} numbers")
        self._known: dict[Hashable, Cut] = {}
        self._owners: dict[str, int] = {}

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that hold everything which stages run."""
        return [self.module] if self._made is None else [self.module, *self._made]

    @property
    def wants_costs(self) -> bool:
        """Whether layers have to be measured before the module can be cut."""
        measured = self._balanced in ("time", "memory")
        return measured and self.cuts is None and self._made is None

    def measure(self, call: Call, tensors: Mapping[str, Tensor], chunks: int) -> None:
        """Measure the layers, and choose by what they cost where stages begin.

        Args:
            call: A call of the module.
            tensors: The tensors of one of its micro-batches.
            chunks: How many micro-batches there are.
        """
        recorded = layers(self.module, self.forward, call.args, call.kwargs, self.stages)
        self._check_enough(recorded.calls())
        self.costs = measure(self.module, recorded, tensors)

        def price(name: str) -> float:
            cost = self.costs[name]
            if self._balanced == "time":
                return cost.seconds
            return _COPIES_OF_PARAMETERS * cost.parameters + chunks * cost.activations

        self.cuts = self._balance(recorded.calls(), price)

    def early(self) -> Cut | None:
        """Cut before there is a call, from the signature of `forward` alone.

        Returns:
            The cut; `None` if that takes the arguments of a real call, which may yet show that the
            module cannot be cut.
        """
        if self.wants_costs:
            return None
        parameters = inspect.signature(self.forward).parameters.values()
        wanted = [p for p in parameters if p.default is p.empty]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in wanted):
            return None
        args = tuple(Input(p.name) for p in wanted if p.kind is not p.KEYWORD_ONLY)
        kwargs = {p.name: Input(p.name) for p in wanted if p.kind is p.KEYWORD_ONLY}
        try:
            return self._cut([p.name for p in wanted], args, kwargs)
        except (UntraceableError, PartitionError):
            return None

    def __call__(self, call: Call) -> Cut:
        """The cut for calls of this kind.

        Raises:
            PartitionError: The module cannot be cut as asked.
            UntraceableError: Its `forward` cannot be recorded.
        """
        key = (call.key, self._state())
        cut = self._known.get(key)
        if cut is None:
            cut = self._cut(list(call.tensors), call.args, call.kwargs)
            # Not `key`: the first cut decides which modules are opened.
            self._known[call.key, self._state()] = cut
            if len(self._known) > _MAX_PARTITIONS:
                del self._known[next(iter(self._known))]
        return cut

    def _cut(self, arguments: Sequence[str], args: Any, kwargs: Mapping[str, Any]) -> Cut:
        if self._made is not None:
            made = chain(self._made, arguments, args, kwargs)
            modules = [[stage] for stage in self._made]
        else:
            if self.cuts is None:
                self.cuts = self._choose(args, kwargs)
            made = partition(self.module, self.forward, args, kwargs, self.cuts)
            modules = [
                [self.module.get_submodule(name) for name in stage.modules] for stage in made.stages
            ]
        cut = Cut(
            made,
            modules,
            [
                batch_norm.layers_of(inner for m in part for inner in m.modules())
                for part in modules
            ],
            [self._tensors(stage, part) for stage, part in zip(made.stages, modules, strict=True)],
            memories(modules),
        )
        if self._made is None:
            self._check_owners(cut)
        return cut

    def _tensors(self, stage: Stage, modules: Iterable[nn.Module]) -> dict[str, Tensor]:
        inside = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        named = ((n, t) for root in self.roots for n, t in _named_tensors(root))
        return {name: t for name, t in named if id(t) in inside or name in stage.attributes}

    def _choose(self, args: Any, kwargs: Mapping[str, Any]) -> list[str]:
        calls = layers(self.module, self.forward, args, kwargs, self.stages).calls()
        self._check_enough(calls)
        if isinstance(self._balanced, str):
            return self._balance(calls, lambda name: _size(self.module.get_submodule(name)))
        counts, names = self._balanced, list(dict.fromkeys(calls))
        if sum(counts) != len(names):
            raise PartitionError(
                f"`balance={list(counts)}` is for {sum(counts)} layers, but"
                f" `{type(self.module).__name__}` has {len(names)}: {', '.join(names)}."
            )
        return [names[start] for start in list(accumulate(counts))[:-1]]

    def _check_enough(self, calls: Sequence[str]) -> None:
        names = dict.fromkeys(calls)
        if len(names) < self.stages:
            raise PartitionError(
                f"`{type(self.module).__name__}` has {len(names)} layers that its `forward` calls"
                f" ({', '.join(names) or 'none'}), too few for {self.stages} stages. Use fewer"
                ' devices, or choose another `module` (`module=""` is the LightningModule itself).'
            )

    def _balance(self, calls: Sequence[str], price: Callable[[str], float]) -> list[str]:
        """Where stages begin so that the dearest is as cheap as can be."""
        names = list(dict.fromkeys(calls))
        starts = untied(self.module, calls)
        if len(starts) < self.stages:
            raise PartitionError(
                f"`{type(self.module).__name__}` can be cut before"
                f" {', '.join(names[s] for s in starts[1:]) or 'no layer'} only, since layers"
                f" around other places share parameters: too few for {self.stages} stages."
            )
        prices = [float(price(name)) for name in names]
        groups = [sum(prices[a:b]) for a, b in pairwise([*starts, len(names)])]
        counts = balance.balance(groups, self.stages)
        return [names[starts[group]] for group in list(accumulate(counts))[:-1]]

    def _check_owners(self, cut: Cut) -> None:
        """Refuse a call whose parameters would have to lie elsewhere than those of another."""
        for stage, tensors in enumerate(cut.tensors):
            for name in tensors:
                if self._owners.setdefault(name, stage) != stage:
                    raise PartitionError(
                        f"`{name}` belongs to stage {self._owners[name]}, but in another kind"
                        f" of call (training or not, other arguments) to stage {stage}. Cut where"
                        " all calls agree."
                    )

    def _state(self) -> Hashable:
        """What tracing takes for granted: the attributes of the modules whose inside it records."""
        if self._made is not None:
            return None
        opened = ancestors(self.cuts or ()) | {""}
        return tuple(
            (name, _fixed(value))
            for path in sorted(opened)
            for name, value in vars(self.module.get_submodule(path)).items()
            if not isinstance(value, Tensor)
        )


def _size(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fixed(value: Any) -> Hashable:
    if isinstance(value, _ATOMS):
        return type(value), value
    if isinstance(value, dict):
        parts = value.items()
        return tuple((key, Same(part)) for key, part in parts if not isinstance(part, Tensor))
    return Same(value)


def _check_count(option: str, given: int, stages: int, wanted: str) -> None:
    if given != stages:
        raise PartitionError(
            f"`{option}` makes {given} stages, but there are {stages} devices. Give {wanted}, or"
            f" `devices={given}`."
        )
