"""Cut the graph of a module's `forward` into stages."""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor, fx, nn

from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.engine.partition import (
    Name,
    Partition,
    PartitionError,
    Stage,
    ancestors,
    canonical,
)
from lightning_mgpu.engine.trace import Result, Trace, line_of, trace

__all__: list[str] = []


def layers(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    at_least: int = 1,
) -> list[str]:
    """Names of the submodules between which a module may be cut, in the order they are called.

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
        graph = trace(module, forward, args, kwargs, opened).graph
        names = list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
        closed = [name for name in names if _can_open(named[name])]
        if len(names) >= at_least or not closed:
            return names
        opened.add(max(closed, key=lambda name: _size(named[name])))


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
    _check_ties(module, parts)
    return _Builder(module, recorded, parts).build()


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


def _check_ties(module: nn.Module, parts: Sequence[Sequence[fx.Node]]) -> None:
    """Refuse parameters that several stages would own."""
    owners: dict[int, tuple[int, str]] = {}
    for stage, nodes in enumerate(parts):
        for name, parameter in _parameters(module, nodes):
            other, its_name = owners.setdefault(id(parameter), (stage, name))
            if other != stage:
                raise PartitionError(
                    f"The parameter `{its_name}` of stage {other} is used in stage {stage}, too, as"
                    f" `{name}`. Cut so that both uses are in one stage, or untie them."
                )


def _parameters(module: nn.Module, nodes: Iterable[fx.Node]) -> Iterable[tuple[str, nn.Parameter]]:
    for node in nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            for name, parameter in called.named_parameters(remove_duplicate=False):
                yield f"{node.target}.{name}", parameter
    for name in _attributes(nodes):
        value = _attribute(module, name)
        if isinstance(value, nn.Parameter):
            yield name, value


def _attributes(nodes: Iterable[fx.Node]) -> list[str]:
    """Parameters and buffers that the nodes use directly."""
    used = (arg for node in nodes for arg in node.all_input_nodes if arg.op == "get_attr")
    return list(dict.fromkeys(str(node.target) for node in used))


def _attribute(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), module)


class _Builder:
    """Makes stages of a recorded graph."""

    def __init__(
        self, module: nn.Module, recorded: Trace, parts: Sequence[Sequence[fx.Node]]
    ) -> None:
        self._module, self._recorded, self._parts = module, recorded, parts
        (output,) = (node for node in recorded.graph.nodes if node.op == "output")
        self._results: list[fx.Node] = list(output.args[0])
        self._stage_of = {node: i for i, nodes in enumerate(parts) for node in nodes}

    def build(self) -> Partition:
        graph = self._recorded.graph
        arguments = [node for node in graph.nodes if node.op == "placeholder"]
        for node in self._results:
            if node.op == "get_attr":
                raise PartitionError(
                    f"`{type(self._module).__name__}.forward` returns `{node.target}` as it is."
                    " Take it from the module in the step instead."
                )
        return Partition(
            tuple(self._stage(index) for index in range(len(self._parts))),
            tuple(str(node.target) for node in arguments),
            tuple(_name(node) for node in self._results),
            self._template(),
            self._origins(),
        )

    def _template(self) -> Any:
        """The output, with results known by their names."""
        return map_leaves(
            lambda leaf: (
                Result(_name(self._results[leaf.name])) if isinstance(leaf, Result) else leaf
            ),
            self._recorded.template,
        )

    def _origins(self) -> dict[Name, frozenset[Name]]:
        origins: dict[fx.Node, frozenset[Name]] = {}
        for node in self._recorded.graph.nodes:
            own = frozenset([str(node.target)]) if node.op == "placeholder" else frozenset()
            origins[node] = own.union(*(origins[arg] for arg in node.all_input_nodes))
        return {_name(node): origins[node] for node in self._results}

    def _stage(self, index: int) -> Stage:
        nodes = self._parts[index]
        inside = set(nodes)
        needed = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes)
        inputs = [n for n in needed if n not in inside and n.op != "get_attr"]
        outputs = [n for n in nodes if self._leaves(n, index)]
        attributes = _attributes(nodes)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for number, name in enumerate(attributes):
            placeholder = graph.placeholder(f"attribute_{number}")
            copies.update(
                {n: placeholder for n in needed if n.op == "get_attr" and n.target == name}
            )
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        compute = _Compute(self._module, graph, nodes, attributes, self._recorded.constants)
        return Stage(
            index,
            tuple(_name(node) for node in inputs),
            tuple(_name(node) for node in outputs),
            tuple(dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module")),
            tuple(name for name in attributes if name not in self._recorded.constants),
            compute,
        )

    def _leaves(self, node: fx.Node, stage: int) -> bool:
        """Whether others than the node's own stage need its value."""
        return node in self._results or any(
            self._stage_of.get(user, stage) != stage for user in node.users
        )


class _Compute:
    """A stage's share of `forward`, as code that fx generates."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        nodes: Sequence[fx.Node],
        attributes: Sequence[str],
        constants: Mapping[str, Tensor],
    ) -> None:
        self._module = module
        self._attributes = [(name, constants.get(name)) for name in attributes]
        self._code = fx.GraphModule(module, graph)
        self._lines = {
            copy.name: line_of(node) for copy, node in zip(_own(graph), nodes, strict=True)
        }

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        attributes = [
            _attribute(self._module, name) if constant is None else constant
            for name, constant in self._attributes
        ]
        try:
            outputs: Sequence[Any] = self._code.forward(*inputs, *attributes)
        except Exception as error:
            self._note(error)
            raise
        return outputs

    def _note(self, error: Exception) -> None:
        """Say which line of the user's `forward` the generated code stands for."""
        generated = self._code.forward.__code__.co_filename
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == generated:
                line = self._lines.get((frame.line or "").partition(" = ")[0])
                if line is not None and hasattr(error, "add_note"):
                    error.add_note(f"({line})")


def _own(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _name(node: fx.Node) -> Name:
    return str(node.target) if node.op == "placeholder" else f"%{node.name}"
