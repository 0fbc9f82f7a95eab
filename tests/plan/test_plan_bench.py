"""Measurements of a module in a rehearsal: layers, seconds, bytes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.plan.bench import Bench
from lightning_mgpu.plan.ledger import CALLER, Holders
from lightning_mgpu.plan.profile import LayerRange, Profile, Tied, Weights


def _measured(
    module: nn.Module,
    batch: Tensor,
    chunks: Sequence[int] = (1,),
    stages: int = 64,
    loss: Callable[[Tensor], Tensor] = torch.sum,
) -> Bench:
    """A bench that has run its steps."""
    cpu = torch.device("cpu")
    bench = Bench(module, module.forward, None, cpu, 1, Splitter(), lambda: StepBatch(batch))
    try:
        while bench.step():
            loss(bench.call((batch,), {}, chunks, stages)).backward()
    finally:
        bench.close()
    return bench


class Skip(nn.Module):
    """Two layers, and an addition that takes from both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.first(x)
        return made * self.second(made)


class Again(nn.Module):
    """The first layer is called once more after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.third(self.first(self.second(self.first(x))))
        return output


class Branching(nn.Module):
    """Calls its second layer only while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.is_open = False

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.first(x)
        if self.is_open:
            made = self.second(made)
        output: Tensor = self.third(made)
        return output


@dataclass
class Clock:
    """Stands still unless it is told."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Costly(nn.Module):
    """Takes some seconds for each sample, and twice that in backward."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds * len(x)
        made: Tensor = self.linear(x)
        if made.requires_grad:
            made.register_hook(self._backward)
        return made

    def _backward(self, gradient: Tensor) -> None:
        self.clock.now += 2 * self.seconds * len(gradient)


def test_seconds_of_gradients_of_weights_are_told_apart() -> None:
    module = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.LayerNorm(256))
    for sample in _measured(module, torch.rand(64, 256), [2, 4]).samples():
        first, tanh, second, norm = sample.weights
        assert first > 0
        assert second > 0
        assert (tanh, norm) == (0, 0)
        for layer, seconds in enumerate(sample.weights):
            assert seconds <= sample.backward[layer]


def test_seconds_are_those_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    def loss(output: Tensor) -> Tensor:
        clock.now += 100
        return output.sum()

    net = nn.Sequential(*(Costly(clock, seconds) for seconds in (1, 4, 2)))
    bench = _measured(net, torch.ones(12, 4), chunks=(1, 4), stages=3, loss=loss)
    one, four = bench.samples()
    for sample, size in ((one, 12), (four, 3)):
        assert sample.size == size
        assert sample.forward == pytest.approx([size, 4 * size, 2 * size])
        assert sample.backward == pytest.approx([2 * size, 8 * size, 4 * size])
        assert sample.overhead == pytest.approx((0, 0), abs=1e-9)
        assert sample.own == pytest.approx(100)


def test_bytes_are_those_of_whoever_makes_keeps_and_takes() -> None:
    (sample,) = _measured(Skip(), torch.ones(8, 4), chunks=(2,)).samples()
    found = {who: size for who, size in sample.values.items() if who != _TEMPORARY}
    assert found == {
        Holders(frozenset({0}), CALLER, frozenset({0})): 4 * 4 * 4,
        # Both factors are kept by the product, which is computed where the second layer is.
        Holders(frozenset({1}), 0, frozenset({1})): 4 * 6 * 4,
        Holders(frozenset({1}), None, frozenset()): 4 * 6 * 4,
        Holders(frozenset(), 1, frozenset({CALLER})): 4 * 6 * 4,
    }


# What is of no consequence: nobody keeps it, and nobody else takes it.
_TEMPORARY = Holders(frozenset(), None, frozenset())


def test_bytes_are_those_that_autograd_keeps_of_a_transformer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    net, batch = nn.Sequential(layer, nn.Linear(16, 3)), torch.randn(4, 5, 16)
    (sample,) = _measured(net, batch, stages=2).samples()
    counted = sum(
        size for who, size in sample.values.items() if who.keepers or CALLER in who.consumers
    )
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(batch)
    kept[output.untyped_storage().data_ptr()] = output
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_compiled_layer_stays_compiled_and_hands_on_what_it_makes() -> None:
    ran = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(graph)
            return graph.forward(*args)

        return run

    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    net = nn.Sequential(nn.Linear(4, 4), torch.compile(inner, backend=backend), nn.Linear(6, 6))
    (sample,) = _measured(net, torch.ones(8, 4)).samples()
    assert len(ran) == 5 + 4  # steps with each layer in a stage of its own, and with all in one
    assert sample.values[Holders(frozenset({1, 2}), 1, frozenset({2}))] == 8 * 6 * 4


def test_layers_lie_together_if_one_is_called_before_and_after() -> None:
    bench = _measured(Again(), torch.ones(4, 4))
    assert bench.names == ["first", "third"]
    assert set(bench.tensors[0]) == {
        *("first.weight", "first.bias"),
        *("second.weight", "second.bias"),
    }


def test_layer_that_the_first_batch_does_not_come_to() -> None:
    net = Branching()

    def loss(output: Tensor) -> Tensor:
        net.is_open = True
        return output.sum()

    bench = _measured(net, torch.ones(4, 4), loss=loss)
    assert bench.names == ["first", "third"]
    assert len(bench.samples()[0].forward) == 2


def test_tied_parameters_are_copied_by_other_stages() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    bench = _measured(net, torch.ones(4, 4))
    assert bench.tied == [Tied(0, frozenset({0, 2}), 64)]
    weights = [Weights(80, 80, 0), Weights(), Weights()]
    profile = Profile(bench.names, weights, Weights(), 4, 1, bench.samples(), tied=bench.tied)
    assert profile.weights_of(LayerRange(0, 3)).total == 160
    assert profile.weights_of(LayerRange(0, 1)).total == 160
    assert profile.weights_of(LayerRange(1, 2)).total == 0
    assert profile.weights_of(LayerRange(1, 3)).total == 128
