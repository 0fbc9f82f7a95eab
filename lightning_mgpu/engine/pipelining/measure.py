"""What each layer costs: measured on one micro-batch, layer by layer."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu.engine.batch_norm import Recorder, layers_of
from lightning_mgpu.engine.pipelining import values
from lightning_mgpu.engine.pipelining.shadow import Shadow
from lightning_mgpu.engine.pipelining.stage_builder import attribute
from lightning_mgpu.engine.pipelining.trace import Trace

__all__: list[str] = []

# The first time is for torch to warm up; of the others, the quickest counts.
_TIMES = 4


@dataclass
class Cost:
    """What a layer costs for one micro-batch.

    Attributes:
        seconds: Of its forward and backward.
        parameters: Bytes of its parameters.
        activations: Bytes that are kept for its backward, parameters apart.
    """

    seconds: float = 0.0
    parameters: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.parameters + other.parameters,
            self.activations + other.activations,
        )


def measure(module: nn.Module, recorded: Trace, tensors: Mapping[str, Tensor]) -> dict[str, Cost]:
    """The cost of each layer, by name, in the order of calls.

    What `forward` does between layers is charged to the layer before. The module's parameters,
    their gradients, running statistics and torch's generator stay as they are.

    Args:
        module: The module.
        recorded: A trace of its `forward`, whose calls of submodules are the layers.
        tensors: The arguments' tensors of one micro-batch, by name.
    """
    shadow = Shadow([module])
    recorder = Recorder(layers_of(module.modules()))
    recorder.attach()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            shadow.entered(),
        ):
            return _Measurement(module, recorded, tensors).run()
    finally:
        recorder.detach()
        shadow.take_gradients()


class _Measurement:
    def __init__(self, module: nn.Module, recorded: Trace, tensors: Mapping[str, Tensor]) -> None:
        self._module, self._recorded = module, recorded
        self._values: dict[fx.Node, Any] = {}
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._tensors[name].requires_grad_(tensor.requires_grad)

    def run(self) -> dict[str, Cost]:
        costs: dict[str, Cost] = {}
        before = Cost()
        layer: str | None = None
        for node in self._recorded.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._tensors[str(node.target)]
            elif node.op == "get_attr":
                constant = self._recorded.constants.get(str(node.target))
                found = attribute(self._module, str(node.target)) if constant is None else constant
                self._values[node] = found
            elif node.op != "output":
                cost = self._measure(node)
                if node.op == "call_module":
                    layer = str(node.target)
                    called = self._module.get_submodule(layer)
                    known = costs.setdefault(layer, Cost(parameters=_size(called.parameters())))
                    costs[layer] = known + cost + before
                    before = Cost()
                elif layer is None:
                    before = before + cost
                else:
                    costs[layer] = costs[layer] + cost
        return costs

    def _measure(self, node: fx.Node) -> Cost:
        function = self._function(node)
        seconds = []
        for _ in range(_TIMES):
            inputs = {n: values.map_tensors(_leaf, self._values[n]) for n in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
            kept = _Kept(self._module)
            started = time.perf_counter()
            with kept.hooks():
                output = function(*args, **kwargs)
            _backward(output, self._module, inputs.values())
            _wait(output)
            seconds.append(time.perf_counter() - started)
        self._values[node] = values.map_tensors(_cut, output)
        return Cost(min(seconds[1:]), 0, kept.bytes)

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))
        if node.op == "call_method":
            name = str(node.target)
            return lambda receiver, *args, **kwargs: getattr(receiver, name)(*args, **kwargs)
        assert callable(node.target)
        return node.target


class _Kept:
    """Counts the bytes that autograd keeps, each memory once."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._seen: dict[int, int] = {}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = min(storage.nbytes(), tensor.nbytes)
        return tensor


def _leaf(tensor: Tensor) -> Tensor:
    """A copy that may be written to in place, as it is in the graph of its module."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return values.enter(values.copy(tensor))


def _cut(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _backward(output: Any, module: nn.Module, inputs: Iterable[Any]) -> None:
    wanting = [t for t in values.tensors(output) if t.requires_grad and t.grad_fn is not None]
    if not wanting:
        return
    of: Sequence[Tensor] = [
        *(t for value in inputs for t in values.tensors(value) if t.requires_grad),
        *(p for p in module.parameters() if p.requires_grad),
    ]
    seeds = [torch.ones_like(tensor) for tensor in wanting]
    torch.autograd.grad(wanting, of, seeds, allow_unused=True)


def _wait(output: Any) -> None:
    for tensor in values.tensors(output):
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
