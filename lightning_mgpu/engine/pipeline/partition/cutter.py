"""Assign each submodule to a stage, once, from an observed call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any, Literal

from torch import Tensor, nn

from lightning_mgpu._compat.torch_modules import buffers_of, parameters_of
from lightning_mgpu.engine import batch_norm
from lightning_mgpu.engine.pipeline.partition import choice
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError, canonical
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, Measured, measured
from lightning_mgpu.engine.pipeline.partition.observation import observe, registered
from lightning_mgpu.engine.pipeline.partition.stage_planner import Chosen, StagePlanner

Balance = Sequence[int] | Literal["parameters", "time", "memory", "auto"]

# What a parameter takes beside itself: its gradient, and two moments in the optimizer.
_COPIES_OF_PARAMETERS = 4


@dataclass(frozen=True, eq=False)
class Cut:
    """Assignment of submodules, parameters and buffers to stages.

    Attributes:
        layers: Of each stage, the names of the submodules that it computes, in order.
        units: By name, each submodule that is computed as a whole, and its stage.
        tensors: Parameters and buffers of each stage, by name.
        way: The stages that the observed call has visited, in order.
        stage_of: The stage of each module, by its `id`; those that are opened have none.
        owner: The stage of each parameter and buffer, by its `id`.
        normalised: Layers that keep running statistics.
        writers: The units, by their `id`, that write to what they are called with.
    """

    layers: tuple[tuple[str, ...], ...]
    units: Mapping[str, tuple[nn.Module, int]]
    tensors: list[dict[str, Tensor]]
    way: tuple[int, ...]
    stage_of: Mapping[int, int]
    owner: Mapping[int, int]
    normalised: list[nn.Module]
    writers: frozenset[int] = frozenset()


class Cutter:
    """Cuts a module into stages.

    Args:
        module: The module.
        forward: Its own `forward`.
        stages: How many.
        split_at: Names of the submodules at which the second and later stages begin.
        balanced: Without `split_at`: layers in each stage, or what to balance.
        made: Stages that the user has made; nothing is cut then.
        planner: Chooses how many stages there are, where they begin with ``balanced="auto"``, and
            what is computed again.
        chosen: What it has chosen before.

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
        planner: StagePlanner | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        self.module, self.forward, self.stages = module, forward, stages
        self._balanced, self._made, self._planner = balanced, made, planner
        self._given: list[str] | None = None
        self._starts: list[str] | None = None
        self.costs: dict[str, Cost] = {}
        """Of each layer, if they have been measured."""
        self.cut: Cut | None = None
        """The cut, once it is known."""
        self.chosen: Chosen | None = None
        """What the planner has chosen, if there is one."""
        if split_at is not None:
            _check_count("split_at", len(split_at) + 1, stages, f"{stages - 1} names")
            self._given = self._starts = [canonical(module, name) for name in split_at]
        if chosen is not None and {*chosen.best.starts} <= {*dict(module.named_modules())}:
            self._take(chosen)
        elif split_at is None and made is not None:
            if planner is not None and not len(made) % stages:
                self.stages = stages = len(made)  # as many as there are
            _check_count("configure_pipeline", len(made), stages, f"{stages} modules")
            self.forward = _Chain(made)
            self.cut = self._of_made(made)
        elif split_at is None and not isinstance(balanced, str):
            _check_count("balance", len(balanced), stages, f"{stages} numbers")

    def current(self) -> Cut | None:
        """The cut, if it is known and its modules are still there."""
        if self.cut is not None and self._made is None:
            for name, (module, _) in self.cut.units.items():
                if _at(self.module, name) is not module:
                    self.cut = None
                    if self._planner is not None:
                        self.chosen, self._starts = None, self._given
                    break
        return self.cut

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that hold everything which stages run."""
        return [self.module] if self._made is None else [self.module, *self._made]

    @property
    def wants_costs(self) -> bool:
        """Return whether layers have to be measured before the module can be cut."""
        if self._made is not None:
            return False
        if self._planner is not None:
            return self.chosen is None
        return self._balanced in ("time", "memory") and self._starts is None

    def expected(self) -> Cut | None:
        """The likely cut before the first call; `None` if that cannot be told."""
        if self.cut is not None or self.wants_costs:
            return self.cut
        called = registered(self.module)
        try:
            layers, counts = self._chosen(Measured(called, {}), 1)
        except PartitionError:
            return None
        return self._made_of(layers, counts)

    def observe(
        self,
        run: Callable[[], Any],
        chunks: int,
        others: Mapping[int, Callable[[], Any]] | None = None,
    ) -> Cut:
        """Cut the module by what a call does.

        Args:
            run: Calls the module's `forward`, with a graph if layers are to be measured.
            chunks: How many micro-batches there will be.
            others: The same for other numbers, among which the planner may choose.

        Raises:
            PartitionError: The module cannot be cut as asked.
        """
        if self.wants_costs:
            called, self.costs = self._measured({chunks: run, **(others or {})}, chunks)
        else:
            called, _ = observe(self.module, run)
        layers, counts = self._chosen(Measured(called, self.costs), chunks)
        writers = frozenset(id(call.module) for call in called.walk() if call.writes)
        self.cut = replace(self._made_of(layers, counts), writers=writers)
        if self.costs:
            self.costs = {name: self.costs[name] for name in layers.names()}
        return self.cut

    def _measured(self, runs: Mapping[int, Callable[[], Any]], usual: int) -> Measured:
        """Measure layers, and have the planner choose if there is one."""
        if self._planner is None:
            return measured(self.module, runs[usual])
        found: dict[int, Measured] = {}
        for count in sorted(runs, reverse=True):  # small micro-batches first
            if not found or self._planner.has_room(found, count):
                found[count] = measured(self.module, runs[count], self._planner.least)
        self._take(self._planner.chosen(found, self._dealt))
        # Another process may have chosen what is not possible here.
        nearest = self.chosen.best.chunks if self.chosen else usual
        return found[min(found, key=lambda count: abs(count - nearest))]

    def _chosen(self, found: Measured, chunks: int) -> tuple[choice.Layers, list[int]]:
        dealt = self._dealt(found, chunks, self.stages)
        if dealt is None:
            names = choice.opened_until(found.called, self.stages, self._size).names()
            raise PartitionError(
                f"`{type(self.module).__name__}` has {len(names)} layers that its `forward` calls"
                f" ({', '.join(names) or 'none'}), too few for {self.stages} stages. Use fewer"
                ' devices, or choose another `module` (`module=""` is the LightningModule itself).'
            )
        layers, counts = dealt
        names = layers.names()
        starts = [names[first] for first in list(accumulate(counts))[:-1]]
        try:
            # Only those are opened within which a stage begins.
            return choice.beginning_at(found.called, starts)
        except PartitionError:
            return layers, counts

    def _dealt(
        self, found: Measured, chunks: int, stages: int
    ) -> tuple[choice.Layers, list[int]] | None:
        """Distribute layers to stages; `None` if they are too few."""
        called = found.called
        if self._starts is not None:
            return choice.beginning_at(called, self._starts)
        if not isinstance(self._balanced, str):
            layers = choice.opened_until(called, stages, self._size)
            names, counts = layers.names(), list(self._balanced)
            if sum(counts) != len(names):
                raise PartitionError(
                    f"`balance={counts}` is for {sum(counts)} layers, but"
                    f" `{type(self.module).__name__}` has {len(names)}: {', '.join(names)}."
                )
            return layers, counts
        return choice.choose(called, stages, self._price(found.costs, chunks))

    def _take(self, chosen: Chosen | None) -> None:
        """Cut as has been chosen."""
        if chosen is not None:  # else there are too few layers, which is found out later
            self.chosen, self._starts = chosen, list(chosen.best.starts)
            self.stages = len(self._starts) + 1

    def _price(self, costs: Mapping[str, Cost], chunks: int) -> Callable[[str], float]:
        """What stages are to have about as much of."""

        def price(name: str) -> float:
            if not costs or self._balanced == "parameters":
                return self._size(name)
            cost = costs[name]
            if self._balanced == "memory":
                return _COPIES_OF_PARAMETERS * cost.parameters + chunks * cost.activations
            return cost.seconds

        return price

    def _size(self, name: str) -> float:
        return sum(p.nbytes for p in self.module.get_submodule(name).parameters())

    def _made_of(self, layers: choice.Layers, counts: Sequence[int]) -> Cut:
        names = iter(layers.names())
        parts = tuple(tuple(next(names) for _ in range(count)) for count in counts)
        stage_of = {name: stage for stage, part in enumerate(parts) for name in part}
        way = [key for key, _ in groupby(stage_of[call.name] for call in layers.calls())]
        for name, stage in self._never_called(stage_of, layers):
            stage_of[name] = stage
        units = {name: (self.module.get_submodule(name), s) for name, s in stage_of.items()}
        return self._cut(parts, units, way)

    def _never_called(
        self, stage_of: Mapping[str, int], layers: choice.Layers
    ) -> Iterator[tuple[str, int]]:
        """Submodules that other calls may come to: with the stage of what stands before them."""
        called = {call.name for call in layers.called.walk()}
        holders = choice.ancestors(stage_of)
        stage, done = 0, ""
        for name, _ in self.module.named_modules():
            if done and f"{name}.".startswith(f"{done}."):
                continue
            done = ""
            if name in stage_of:
                stage, done = stage_of[name], name
            elif name not in called and name not in holders:
                done = name
                yield name, stage

    def _of_made(self, made: Sequence[nn.Module]) -> Cut:
        units = {f"stage {index}": (module, index) for index, module in enumerate(made)}
        return self._cut(((),) * len(made), units, range(len(made)))

    def _cut(
        self,
        parts: tuple[tuple[str, ...], ...],
        units: Mapping[str, tuple[nn.Module, int]],
        way: Iterable[int],
    ) -> Cut:
        stage_of: dict[int, int] = {}
        owner: dict[int, int] = {}
        for module, stage in units.values():
            for inner in module.modules():
                stage_of.setdefault(id(inner), stage)
            for tensor in (*module.parameters(), *module.buffers()):
                owner.setdefault(id(tensor), stage)
        # What opened modules hold themselves lies with what they call first.
        for name, module in self.module.named_modules():
            inside = [s for n, (_, s) in units.items() if not name or n.startswith(f"{name}.")]
            for own in (*parameters_of(module).values(), *buffers_of(module).values()):
                if own is not None and inside:
                    owner.setdefault(id(own), inside[0])
        named = [pair for root in self.roots for pair in _named_tensors(root)]
        tensors: list[dict[str, Tensor]] = [{} for _ in range(self.stages)]
        for name, tensor in named:
            tensors[owner.get(id(tensor), 0)].setdefault(name, tensor)
        normalised = batch_norm.layers_of(m for root in self.roots for m in root.modules())
        unique = list({id(layer): layer for layer in normalised}.values())
        return Cut(parts, units, tensors, tuple(way), stage_of, owner, unique)


class _Chain:
    """Call modules one after another, each with the output of the one before.

    A tuple is handed on as several arguments.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._modules[0](*args, **kwargs)
        for module in self._modules[1:]:
            output = module(*output) if type(output) is tuple else module(output)
        return output


def _at(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_count(option: str, given: int, stages: int, wanted: str) -> None:
    if given != stages:
        raise PartitionError(
            f"`{option}` makes {given} stages, but there are {stages} devices. Give {wanted}, or"
            f" `devices={given}`."
        )
