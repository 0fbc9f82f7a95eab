"""Every tensor lies where it is computed with: held without a GPU, by devices of the tests' own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from placed import SLOTS, Placed, WrongSlotError, factories, put, put_module, taken
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mgpu.engine import parameter_leaves as engine_leaves
from lightning_mgpu.engine.data_parallel.loss import joint_loss
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.pipeline.check.parity import Parity
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.cutter import Cut, Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime import segments, stand_ins
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.engine.randomness import RandomStreams
from lightning_mgpu.engine.workers import Workers


class Skipping(nn.Module):
    """What one stage makes, others need, too; a parameter and a buffer between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        early = torch.tanh(self.first(x))
        middle = torch.tanh(self.second(early)) * self.scale
        return self.third(middle + early) + self.shift


class Tied(nn.Module):
    """The first and the last layer share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval())
        self.second, self.third = nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.first(x))))


class Again(nn.Module):
    """Activation checkpointing of the user's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Checkpointing(Skipping):
    def __init__(self) -> None:
        super().__init__()
        self.second = Again(nn.Sequential(self.second, nn.Tanh()))
        self.third = Again(nn.Sequential(nn.Tanh(), self.third))


class Structured(Skipping):
    """Takes and returns structures."""

    def forward(self, x: Any) -> Any:
        made = super().forward(x["x"] + x["rest"][0])
        return {"made": made, "all": [made * 2, x["x"]]}


X = torch.linspace(-1, 1, 16 * 6, dtype=torch.float64).view(16, 6)
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Skipping": (Skipping, X),
    "Tied": (Tied, X),
    "Normalised": (Normalised, X),
    "Checkpointing": (Checkpointing, X),
    "Structured": (Structured, {"x": X, "rest": (X * 0.5,)}),
}


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build().double()


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["made"].square().sum() + output["all"][0].sum()
    return output.square().sum()


def _assert_same_gradients(module: nn.Module, reference: nn.Module) -> None:
    for (name, parameter), (_, other) in zip(
        module.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert parameter.grad is not None, name
        assert parameter.grad.device == parameter.device, name
        torch.testing.assert_close(taken(parameter.grad), other.grad, rtol=0, atol=1e-12)


def _pipelined(build: Callable[[], nn.Module], x: Any, stages: int, **options: Any) -> None:
    """One step, held against the same module on the CPU."""
    module, reference = _built(build), _built(build)
    expected = _loss(reference(copy.deepcopy(x)))
    expected.backward()
    devices = SLOTS[:stages]
    starts = ["second", "third"][3 - stages :]
    cutter = Cutter(module, module.forward, stages, starts)

    def place(cut: Cut | None) -> None:
        assert cut is not None
        owned = zip(devices, cut.tensors, strict=True)
        put_module(module, {id(t): device for device, of in owned for t in of.values()})

    place(cutter.expected())
    x = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: put(tensor, devices[0]), x)
    made = Pipeline(
        cutter,
        Splitter(),
        devices,
        chunks=Chunks(stages, 4),
        step_batch=lambda: StepBatch([x]),
        parity=Parity("error", "Net", devices),
        **options,
    )
    try:
        for _ in range(2):
            module.zero_grad()
            loss = _loss(made(x))
            assert loss.device == devices[0]
            loss.backward()
            torch.testing.assert_close(taken(loss), expected, rtol=0, atol=1e-12)
            _assert_same_gradients(module, reference)
    finally:
        made.close()


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("mode", ["never", "except_last", "always"])
@pytest.mark.parametrize("model", MODELS)
def test_stages_compute_with_tensors_of_their_own(model: str, mode: Any, stages: int) -> None:
    build, x = MODELS[model]
    with factories():
        _pipelined(build, x, stages, checkpoint=mode)


def _replicated(build: Callable[[], nn.Module], x: Any) -> None:
    module, reference = _built(build), _built(build)
    expected = _loss(reference(copy.deepcopy(x)))
    expected.backward()
    put_module(module, {})
    workers, streams = Workers(SLOTS), RandomStreams(SLOTS)
    streams.restart()
    replicas = Replicas(module, SLOTS)
    parts = [slice(0, 5), slice(5, 10), slice(10, 16)]
    shards = [
        torch.utils._pytree.tree_map_only(Tensor, lambda t, p=part, d=device: put(t[p], d), x)
        for part, device in zip(parts, SLOTS, strict=True)
    ]
    try:
        for _ in range(2):
            module.zero_grad()
            with streams.step("step", 3) as drawn:
                with replicas.step(3, sizes=[5, 5, 6]) as modules:
                    pairs = zip(modules, shards, strict=True)
                    tasks = [lambda m=m, s=s: _loss(m(s)) / len(s) for m, s in pairs]
                    losses = workers.run(tasks)
                assert [loss.device for loss in losses] == SLOTS
                loss = joint_loss(losses, [5, 5, 6], drawn, replicas, workers, str)
                assert loss is not None
                assert loss.device == SLOTS[0]
                (loss * 16).backward()
            _assert_same_gradients(module, reference)
            torch.testing.assert_close(taken(loss) * 16, expected, rtol=0, atol=1e-12)
    finally:
        replicas.finish()
        workers.close()


@pytest.mark.parametrize("model", ["Skipping", "Tied", "Normalised", "Checkpointing"])
def test_replicas_compute_with_tensors_of_their_own(model: str) -> None:
    build, x = MODELS[model]
    with factories():
        _replicated(build, x)


def _not_copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor


@pytest.mark.parametrize("file", [stand_ins, segments])
def test_forgotten_copy_is_an_error(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "copied", _not_copied)
    with factories(), pytest.raises(RuntimeError):
        _pipelined(Skipping, X, 2)


def test_forgotten_refresh_gives_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_leaves, "copy_into", lambda target, source: None)
    with factories(), pytest.raises(AssertionError):
        _replicated(Skipping, X)


def test_tensors_of_several_slots_do_not_meet() -> None:
    first, second = (put(X, device) for device in SLOTS[:2])
    assert isinstance(first, Placed)
    with pytest.raises(WrongSlotError, match="tensors on meta:0, meta:1"):
        first + second
    with pytest.raises(WrongSlotError, match="tensors on cpu, meta:0"):
        first + X
    assert (first.to(SLOTS[1]) + second).device == SLOTS[1]
    assert (first * torch.tensor(2.0)).device == SLOTS[0]
