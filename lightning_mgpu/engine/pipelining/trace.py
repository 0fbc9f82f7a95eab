"""Record what a module computes, as a graph whose nodes are calls of its submodules."""

import linecache
import logging
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_mgpu.engine.batch import map_leaves

log = logging.getLogger(__name__)

__all__: list[str] = []

_LINE = "lightning_mgpu.line"
# Where frames lie that say nothing to the author of a model.
_MACHINERY = ("/torch/fx/", "/torch/nn/modules/module.py", "/torch/overrides.py", __file__)
# What makes tensors from none: traced like the rest, or it would be made once and for all.
_FACTORIES: frozenset[Any] = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "bartlett_window", "empty", "empty_strided", "eye", "full", "hann_window"),
        *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm"),
        *("tensor", "tril_indices", "triu_indices", "zeros"),
    )
)


class UntraceableError(ValueError):
    """The module's `forward` cannot be recorded."""


class Input:
    """Stands for a tensor among the arguments of a call to be traced."""

    def __init__(self, name: str) -> None:
        self.name = name


class Result:
    """Stands for a value among what a traced call returns: its place, or its name."""

    def __init__(self, name: Any) -> None:
        self.name = name


@dataclass(frozen=True)
class Trace:
    """A recorded call.

    Attributes:
        graph: Placeholders are the arguments' tensors, by name; its output is a list of results.
        template: What the call returned, with a `Result` for every value that it computed.
        constants: Tensors that `forward` made from nothing else, by the target of their node.
    """

    graph: fx.Graph
    template: Any
    constants: dict[str, Tensor]

    def calls(self) -> list[str]:
        """Names of the submodules that are called, in order, one for each call."""
        return [str(node.target) for node in self.graph.nodes if node.op == "call_module"]


def trace(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    opened: Iterable[str],
) -> Trace:
    """Record one call.

    Args:
        module: Whose `forward` it is.
        forward: The module's own.
        args: Its arguments, with an `Input` for each tensor; all else is taken as it is.
        kwargs: The same by name.
        opened: Names of the submodules whose inside is recorded too; others are one node for each
            call.

    Raises:
        UntraceableError: Names the line that cannot be recorded.
    """
    tracer = _Tracer(forward, args, dict(kwargs), frozenset(opened) | {""})
    inside = [m for name, m in module.named_modules() if name in tracer.opened]
    _warn_of_hooks(module, inside)
    before = [dict(vars(m)) for m in inside]
    drawn = random.getstate(), torch.default_generator.get_state()
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise UntraceableError(_explain(module, error)) from error
    finally:
        constants, written = _restore(inside, before)
    if written:
        raise UntraceableError(
            f"`{type(module).__name__}.forward` sets {written}, which is lost when it is cut into"
            f" stages: set it in the step, or in a submodule that no stage begins in."
            f" {_OTHERWISE}"
        )
    if random.getstate() != drawn[0] or not torch.equal(
        torch.default_generator.get_state(), drawn[1]
    ):
        raise UntraceableError(
            f"`{type(module).__name__}.forward` draws random numbers between its submodules in a"
            " way that would be fixed once and for all. Draw them in a submodule that no stage"
            f" begins in. {_OTHERWISE}"
        )
    return Trace(graph, tracer.template, constants)


def line_of(node: fx.Node) -> str | None:
    """The user's line that a node was recorded at."""
    place = node.meta.get(_LINE)
    if place is None:
        return None
    name, number = place
    return f"{name}, line {number}: {linecache.getline(name, number).strip()}"


_OTHERWISE = (
    "Or define `configure_pipeline(self)` in the LightningModule, which returns the list of stages."
)


class _Tracer(fx.Tracer):
    """Records calls of all modules but the opened ones as single nodes."""

    # Buffers are looked up at each call, like parameters: they may be replaced or moved.
    proxy_buffer_attributes = True

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        opened: frozenset[str],
    ) -> None:
        super().__init__()
        self.opened = opened
        self.template: Any = None
        self._forward, self._args, self._kwargs = forward, args, kwargs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Instead of a placeholder for each parameter of `forward`: one for each tensor."""

        def placeholder(leaf: Any) -> Any:
            if isinstance(leaf, Input):
                return self.create_proxy("placeholder", leaf.name, (), {})
            return leaf

        args, kwargs = map_leaves(placeholder, (self._args, self._kwargs))

        def run(_: nn.Module) -> list[Any]:
            with _Factories(self):
                returned = self._forward(*args, **kwargs)
            results: list[Any] = []

            def result(leaf: Any) -> Any:
                if not isinstance(leaf, (fx.Proxy, Tensor)):
                    return leaf
                results.append(leaf)
                return Result(len(results) - 1)

            self.template = map_leaves(result, returned)
            return results

        return run, [self.root]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_machinery(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            node.meta[_LINE] = frame.f_code.co_filename, frame.f_lineno
        return node


class _Factories(TorchFunctionMode):
    """Records `torch.zeros` and its like, which have no tensor among their arguments."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _restore(
    modules: list[nn.Module], before: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], str]:
    """Undo what tracing has done to the modules' attributes.

    Returns:
        Constants, which fx keeps as attributes, and the names of what `forward` itself has set.
    """
    constants: dict[str, Tensor] = {}
    written = []
    for module, state in zip(modules, before, strict=True):
        for name, value in list(vars(module).items()):
            if name in state and state[name] is value:
                continue
            if name.startswith("_tensor_constant"):
                constants[name] = value
            else:
                written.append(f"`{type(module).__name__}.{name}`")
            if name in state:
                vars(module)[name] = state[name]
            else:
                del vars(module)[name]
    return constants, ", ".join(written)


def _warn_of_hooks(root: nn.Module, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        hooks = [hook for hook in forward if getattr(hook, "needs_values", True)]
        backward = (*module._backward_hooks.values(), *module._backward_pre_hooks.values())
        if module is not root and (hooks or backward):
            log.warning(
                "A `%s` has hooks, but a stage begins inside it: they see no values. Put them on"
                " submodules, or cut elsewhere.",
                type(module).__name__,
            )


def _explain(module: nn.Module, error: Exception) -> str:
    place = _users_line(error.__traceback__)
    where = f" at {place}" if place else ""
    reason = " ".join(str(error).split())
    return (
        f"`{type(module).__name__}.forward` cannot be cut into stages{where} ({reason}). Put what"
        " depends on the values of tensors into a submodule that no stage begins in."
        f" {_OTHERWISE}"
    )


def _users_line(trace: TracebackType | None) -> str | None:
    for frame in reversed(traceback.extract_tb(trace)):
        if not _is_machinery(frame.filename):
            return f"{frame.filename}, line {frame.lineno}: `{frame.line}`"
    return None


def _is_machinery(filename: str) -> bool:
    return any(part in filename for part in _MACHINERY) or "engine/batch/" in filename
