"""Make stages of a recorded graph whose nodes have been dealt out."""

import traceback
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor, fx, nn

from lightning_mgpu.engine.batch import map_leaves
from lightning_mgpu.engine.pipelining.partition import Name, Partition, PartitionError, Stage
from lightning_mgpu.engine.pipelining.trace import Result, Trace, line_of

__all__: list[str] = []


class StageBuilder:
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
            if str(node.target) in self._recorded.constants:
                raise PartitionError(
                    f"`{type(self._module).__name__}.forward` returns a tensor that depends neither"
                    " on its arguments nor on its parameters. Make it in the step instead."
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
        inside = dict.fromkeys(self._parts[index])
        needed = dict.fromkeys(arg for node in inside for arg in node.all_input_nodes)
        constants = [n for n in needed if str(n.target) in self._recorded.constants]
        inputs = [n for n in needed if n not in inside and n not in constants]
        attributes = [*(n for n in inside if n.op == "get_attr"), *constants]
        nodes = [n for n in inside if n.op != "get_attr"]
        outputs = [n for n in inside if self._is_needed_elsewhere(n, index)]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in (*inputs, *attributes)}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        names = [str(node.target) for node in attributes]
        return Stage(
            index,
            tuple(_name(node) for node in inputs),
            tuple(_name(node) for node in outputs),
            tuple(dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module")),
            tuple(name for name in names if name not in self._recorded.constants),
            _Compute(self._module, graph, nodes, names, self._recorded.constants),
        )

    def _is_needed_elsewhere(self, node: fx.Node, stage: int) -> bool:
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
            attribute(self._module, name) if constant is None else constant
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


def attribute(module: nn.Module, path: str) -> Any:
    """A submodule's attribute, by its full name."""
    return reduce(getattr, path.split("."), module)


def _own(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _name(node: fx.Node) -> Name:
    return str(node.target) if node.op == "placeholder" else f"%{node.name}"
