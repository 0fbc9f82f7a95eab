"""Cut the graph of a module's `forward` into stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from lightning_mgpu.engine.pipelining.partition import (
    Partition,
    PartitionError,
    ancestors,
    canonical,
)
from lightning_mgpu.engine.pipelining.stage_builder import StageBuilder, attribute
from lightning_mgpu.engine.pipelining.trace import Trace, trace

__all__: list[str] = []


def layers(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    at_least: int = 1,
) -> Trace:
    """The layers between which a module may be cut: the submodules that this trace calls.

    Its children, with `nn.Sequential` opened. If those are too few, the layer with most parameters
    is opened as well, as long as it is none of torch's own.

    Args:
        module: As for `partition`, like the arguments that follow.
        forward: The module's own.
        args: Its arguments.
        kwargs: The same by name.
        at_least: How many are needed.

    Raises:
        UntraceableError: `forward`, or that of a layer that has to be opened, cannot be recorded.
    """
    named = dict(module.named_modules())
    opened = {name for name, m in named.items() if isinstance(m, nn.Sequential)}
    while True:
        recorded = trace(module, forward, args, kwargs, opened)
        names = recorded.calls()
        closed = [name for name in names if _can_open(named[name])]
        if len(set(names)) >= at_least or not closed:
            return recorded
        opened.add(max(closed, key=lambda name: _size(named[name])))


def untied(module: nn.Module, calls: Sequence[str]) -> list[int]:
    """The layers that a stage can begin with: no parameter is used both before and after.

    Args:
        module: The module.
        calls: Names of the layers that it calls, in order.

    Returns:
        Their places among the names, each of which counts once.
    """
    names = list(dict.fromkeys(calls))
    position = {name: index for index, name in enumerate(names)}
    first: dict[int, int] = {}
    tied: set[int] = set()
    reached = 0
    for name in calls:
        reached = max(reached, position[name])
        for parameter in module.get_submodule(name).parameters():
            tied.update(range(first.setdefault(id(parameter), reached) + 1, reached + 1))
    return [index for index in range(len(names)) if index not in tied]


def partition(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    cuts: Sequence[str],
) -> Partition:
    """Cut a module where its submodules are first called.

    The graph that `torch.fx` records is cut in the order of its nodes. A submodule that no stage
    begins in is one node, which keeps its identity, and with it names, hooks and modes.

    Args:
        module: The module.
        forward: Its own `forward`.
        args: Arguments of a call, with an `Input` for each tensor; all else is taken as it is.
        kwargs: The same by name.
        cuts: Names of the submodules at which a next stage begins, in order.

    Raises:
        UntraceableError: `forward` cannot be recorded.
        PartitionError: A cut is unknown or never reached, cuts are out of order, or a parameter
            would belong to two stages.
    """
    cuts = [canonical(module, cut) for cut in cuts]
    recorded = trace(module, forward, args, kwargs, ancestors(cuts))
    parts = _assign(recorded.graph, cuts)
    _place_attributes(module, recorded, parts)
    return StageBuilder(module, recorded, parts).build()


def _can_open(module: nn.Module) -> bool:
    torchs = type(module).__module__.startswith("torch.")
    return not torchs and any(True for _ in module.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _assign(graph: fx.Graph, cuts: Sequence[str]) -> list[list[fx.Node]]:
    """The nodes of each stage."""
    parts: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_module" and node.target in cuts:
            expected = cuts[len(parts) - 1] if len(parts) <= len(cuts) else None
            if node.target == expected:
                parts.append([])
            elif cuts.index(str(node.target)) >= len(parts):
                raise PartitionError(
                    f"Stages are to begin at {', '.join(cuts)}, but `{node.target}` is called"
                    f" before `{expected}`. Give the split points in the order of their calls."
                )
        if node.op not in ("placeholder", "output", "get_attr"):
            parts[-1].append(node)
    if len(parts) <= len(cuts):
        raise PartitionError(
            f"`{cuts[len(parts) - 1]}` is never called, so no stage can begin at it. Choose a"
            " submodule that `forward` calls itself."
        )
    if not parts[0]:
        raise PartitionError(
            f"Nothing is computed before `{cuts[0]}`, so the first stage would be empty. Let the"
            " second stage begin at a later submodule."
        )
    return parts


def _module_owners(module: nn.Module, parts: Sequence[Sequence[fx.Node]]) -> dict[int, int]:
    """The stage of each parameter of a called submodule, by the parameter's `id`.

    Raises:
        PartitionError: It would be two.
    """
    owners: dict[int, tuple[int, str]] = {}
    for stage, nodes in enumerate(parts):
        for node in nodes:
            if node.op == "call_module":
                called = module.get_submodule(str(node.target))
                for name, parameter in called.named_parameters(str(node.target)):
                    owner, its_name = owners.setdefault(id(parameter), (stage, name))
                    if owner != stage:
                        raise PartitionError(_tie(its_name, owner, name, stage))
    return {key: stage for key, (stage, _) in owners.items()}


def _place_attributes(module: nn.Module, recorded: Trace, parts: list[list[fx.Node]]) -> None:
    """Give each parameter and buffer that `forward` uses directly to a stage.

    To the one whose submodule has it, or else to the first that uses it; later stages get its value
    from there, with each micro-batch.
    """
    owners = _module_owners(module, parts)
    stage_of = {node: stage for stage, nodes in enumerate(parts) for node in nodes}
    found: dict[str, fx.Node] = {}
    for node in [n for n in recorded.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if found.setdefault(name, node) is not node:
            node.replace_all_uses_with(found[name])
    for name, node in found.items():
        if name in recorded.constants:
            continue  # each stage has those itself
        first = min((stage_of[user] for user in node.users if user in stage_of), default=0)
        owner = owners.get(id(attribute(module, name)), first)
        if owner > first:
            raise PartitionError(_tie(name, owner, name, first))
        parts[owner].insert(0, node)


def _tie(name: str, owner: int, other_name: str, other: int) -> str:
    return (
        f"The parameter `{name}` of stage {owner} is used in stage {other}, too, as `{other_name}`."
        " Cut so that both uses are in one stage, or untie them."
    )
