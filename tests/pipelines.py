"""Pipelines of two stages on the CPU, without a Trainer, held against their module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipeline.check.parity import Parity
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks

DEVICES = [torch.device("cpu")] * 2


class Net(nn.Module):
    """A layer, anything, a layer, and anything of its output."""

    def __init__(
        self,
        middle: Callable[[Tensor], Any] = torch.tanh,
        end: Callable[[Tensor], Any] = lambda z: z,
        features: int = 6,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(features, 8), nn.Linear(8, 4)
        self.middle, self.end = Apply(middle), Apply(end)
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.end(self.second(self.middle(self.first(x))))


class Apply(nn.Module):
    """A function as a module, which stays whole when it is cut."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def data(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextmanager
def pipelined(
    module: nn.Module,
    batch: Any = None,
    *,
    chunks: int = 4,
    split_at: str = "second",
    parity_check: Any = "error",
    checkpoint: Any = "never",
    defer_weight_gradients: bool = True,
    **options: Any,
) -> Iterator[Pipeline]:
    """A pipeline in place of the module's `forward`, which is called in a step with `batch`."""
    made = Pipeline(
        Cutter(module, module.forward, 2, [split_at]),
        Splitter(**options),
        DEVICES,
        chunks=Chunks(2, chunks),
        checkpoint=checkpoint,
        defer_weight_gradients=defer_weight_gradients,
        step_batch=lambda: StepBatch(batch),
        parity=Parity(parity_check, type(module).__name__, DEVICES),
    )
    try:
        yield made
    finally:
        made.close()


def assert_same(module: nn.Module, *args: Any, batch: Any = None, **options: Any) -> Any:
    """The pipeline gives what the module gives, and the same gradients; returns its output."""
    expected = module(*_copies(args))
    wanted = _gradients(module, expected)
    with pipelined(module, list(args) if batch is None else batch, **options) as run:
        output = run(*args)
        found = _gradients(module, output)
    torch.testing.assert_close(_tensors(output), _tensors(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    return output


def _copies(args: tuple[Any, ...]) -> list[Any]:
    return [a.detach().clone() if isinstance(a, Tensor) else a for a in args]


def _gradients(module: nn.Module, output: Any) -> list[Any]:
    tensors = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    weights = [torch.linspace(0, 1, t.numel(), dtype=torch.float64).view(t.shape) for t in tensors]
    loss = sum((t.abs() * w).sum() for t, w in zip(tensors, weights, strict=True))
    parameters = list(module.parameters())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
