"""Whatever a module's `forward` does means in a pipeline what it means on one device."""

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import DEVICES, assert_same, data, pipelined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.cutter import Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.engine.pipeline.runtime.traveller import Traveller
from lightning_mgpu.engine.pipeline.runtime.units import Units

CHECKPOINTS = ["never", "except_last", "always"]


class Blocks(nn.Module):
    """`forward` is a function of the module and its arguments."""

    def __init__(self, forward: Callable[..., Any], blocks: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Linear(6, 8)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(blocks)
            )
            self.head = nn.Linear(8, 4)
            self.relu = nn.ReLU(inplace=True)
            self.scale = nn.Parameter(torch.rand(8))
        self.run = forward
        self.double()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def no_grad_block(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        h = self.blocks[0](self.embed(x))
    return self.head(self.blocks[3](h))


def detached_teacher(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    with torch.set_grad_enabled(False):
        target = self.blocks[3](h)
    return self.head(self.blocks[1](h) - target.detach())


def skips(self: Any, x: Tensor) -> Any:
    first = h = self.embed(x)
    kept = []
    for block in self.blocks:
        h = block(h)
        kept.append(h)
    return self.head(h + first + kept[0] * kept[2])


def several_outputs(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    hidden = [block(h) for block in self.blocks]
    return {"logits": self.head(sum(hidden)), "hidden": tuple(hidden), "first": h, "none": None}


def returns_its_argument(self: Any, x: Tensor) -> Any:
    return self.head(self.blocks[3](self.embed(x))), x


def comes_back(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    for block in (*self.blocks, self.blocks[0], self.blocks[3], self.blocks[0]):
        h = block(h)
    return self.head(h)


def own_parameter_everywhere(self: Any, x: Tensor) -> Any:
    h = self.embed(x) * self.scale
    for block in self.blocks:
        h = block(h) * self.scale
    return (
        self.head(h) + F.linear(h, self.head.weight) + F.linear(h, self.blocks[0][0].weight)[:, :4]
    )


def asks_shapes(self: Any, x: Tensor) -> Any:
    batch, features = x.shape
    assert x.dim() == 2
    assert len(x) == batch == x.size(0)
    h = self.embed(x) if features == 6 and isinstance(x, Tensor) else x
    for index in range(x.size(1) - 2):
        h = self.blocks[index](h)
    return self.head(h + torch.zeros(batch, 8, dtype=x.dtype) + torch.arange(8).to(h))


def branches_on_values(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    for block in self.blocks:
        if h.isfinite().all():
            h = block(h)
    return self.head(h)


def writes_slices(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    out = torch.zeros_like(h)
    for index, block in enumerate(self.blocks):
        out[:, 2 * index : 2 * index + 2] = block(h)[:, :2]
    return self.head(out)


def writes_to_what_an_earlier_stage_made(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    other = h * 2
    g = self.blocks[3](h)
    other += g
    other[:, :3] = g[:, :3]
    return self.head(other) + self.head(h)


def in_place_layer_on_a_skip(self: Any, x: Tensor) -> Any:
    h = self.embed(x) + 0
    g = F.relu_(self.blocks[3](h + 0) + 0)
    h.mul_(2)
    return self.head(g + h + self.blocks[0](h))


def in_place_module_on_a_skip(self: Any, x: Tensor) -> Any:
    h = self.embed(x) + 0
    g = self.blocks[3](h * 2) + 0
    return self.head(self.relu(h) + h + self.relu(g) * 2 + g)


def nested_checkpoint(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    for block in self.blocks:
        h = checkpoint(block, h, use_reentrant=False)
    return self.head(h)


def same_tensor_twice(self: Any, x: Tensor) -> Any:
    h = self.embed(x)
    g = self.blocks[3](h)
    assert (h is g) is False
    return self.head(g * g + h * h)


def complex_numbers(self: Any, x: Tensor) -> Any:
    h = torch.fft.fft(self.embed(x))
    return self.head(self.blocks[3](h.real) + h.imag)


def keyword_arguments_and_dicts(self: Any, x: Tensor) -> Any:
    state = {"h": self.embed(x), "list": []}
    for block in self.blocks:
        state["h"] = block(input=state["h"])
        state["list"].append(state["h"])
    return {"out": self.head(torch.stack(state["list"]).sum(0))}


def rearranged(self: Any, x: Tensor) -> Any:
    h = self.embed(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1)
    for block in self.blocks:
        h = torch.einsum("bi,i->bi", block(h), self.scale)
    return self.head(h)


def through_a_submodules_method(self: Any, x: Tensor) -> Any:
    return self.head(self.blocks[3].forward(self.blocks[0].forward(self.embed(x))))


FORWARDS = [
    no_grad_block,
    detached_teacher,
    skips,
    several_outputs,
    returns_its_argument,
    comes_back,
    own_parameter_everywhere,
    asks_shapes,
    branches_on_values,
    writes_slices,
    writes_to_what_an_earlier_stage_made,
    in_place_layer_on_a_skip,
    in_place_module_on_a_skip,
    nested_checkpoint,
    same_tensor_twice,
    complex_numbers,
    keyword_arguments_and_dicts,
    rearranged,
]


def test_reentrant_checkpoints_give_what_one_device_gives() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.embed(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=True)
        return self.head(h)

    alone, split, x = Blocks(forward), Blocks(forward), data(8, 6)
    alone(x).square().sum().backward()
    with pipelined(split, [x], split_at="blocks.3") as run:
        run(x).square().sum().backward()
    for one, other in zip(alone.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-9)


def test_layers_called_by_their_forward_are_looked_into() -> None:
    module, x = Blocks(through_a_submodules_method), data(8, 6)
    assert_same(module, x, split_at="blocks.3.0")
    with (
        pipelined(module, [x], split_at="blocks.3") as run,
        pytest.raises(PartitionError, match=r"`blocks.3` is never called"),
    ):
        run(x)


@pytest.mark.parametrize("checkpointed", CHECKPOINTS)
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_forwards_give_what_one_device_gives(forward: Any, checkpointed: Any) -> None:
    assert_same(Blocks(forward), data(8, 6), split_at="blocks.3", checkpoint=checkpointed)


@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_any_number_of_stages_does(forward: Any, stages: int) -> None:
    module, x = Blocks(forward), data(9, 6)
    expected = _results(module, module.forward, x)
    devices = [torch.device("cpu")] * stages
    run = Pipeline(
        Cutter(module, module.forward, stages), Splitter(), devices, chunks=Chunks(stages, 4)
    )
    try:
        for _ in range(2):
            torch.testing.assert_close(_results(module, run, x), expected, rtol=0, atol=1e-9)
    finally:
        run.close()


def _results(module: nn.Module, call: Any, x: Tensor) -> list[Any]:
    output = call(x.clone())
    first = output if isinstance(output, Tensor) else next(iter(_values(output)))
    parameters = list(module.parameters())
    return [first, *torch.autograd.grad(first.square().sum(), parameters, allow_unused=True)]


def _values(output: Any) -> Any:
    return output.values() if isinstance(output, dict) else output


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_evaluation_does(forward: Any) -> None:
    module = Blocks(forward).eval()
    x = data(8, 6)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pipelined(module, [x], split_at="blocks.3") as run:
            torch.testing.assert_close(run(x), module.forward(x), rtol=0, atol=1e-12)


def test_what_changes_between_calls_is_read_each_time() -> None:
    class Switch(Blocks):
        factor = 1.0
        table: Any = None

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.factor * self.table[0]

    module = Switch(skips)
    x = data(8, 6)
    with pipelined(module, [x], split_at="blocks.3") as run:
        for factor in (1.0, 2.0, 3.0):
            module.factor, module.table = factor, [factor + 1]
            torch.testing.assert_close(run(x), module.forward(x), rtol=0, atol=1e-12)


def test_autocast_blocks_mean_what_they_mean() -> None:
    seen: list[torch.dtype] = []

    def forward(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            h = self.embed(x)
            seen.append(h.dtype)
        g = self.blocks[3](h)
        seen.append(g.dtype)
        return self.head(g)

    module, x = Blocks(forward).float(), data(8, 6).float()
    with pipelined(module, [x], split_at="blocks.3", chunks=2) as run:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(x)
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(x).float().sum().backward()
    assert sorted(map(str, seen)) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2


def test_a_module_replaced_in_mid_run_is_computed() -> None:
    module, x = Blocks(skips), data(8, 6)
    with pipelined(module, [x], split_at="blocks.3") as run:
        run(x)
        module.blocks[1] = nn.Linear(8, 8).double()
        torch.testing.assert_close(run(x), module.forward(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_compiled_layers_are_compiled_and_pipelined(compiled: str) -> None:
    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.inner(x))

    module, x = Blocks(skips), data(8, 6)
    module.blocks[3] = Block(module.blocks[3])
    expected = module(x)
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    if compiled == "wrapped":
        module.blocks[3] = torch.compile(module.blocks[3], backend=backend)
    else:
        module.blocks[3].compile(backend=backend)
    with pipelined(module, [x], split_at="blocks.3") as run:
        run(x)
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-12)
    torch._dynamo.reset()
    assert calls


def test_nothing_is_left_on_the_module() -> None:
    module, x = Blocks(skips), data(8, 6)
    before = {name: dict(vars(inner)) for name, inner in module.named_modules()}
    with pipelined(module, [x], split_at="blocks.3", checkpoint="always") as run:
        run(x).sum().backward()
    for name, inner in module.named_modules():
        assert vars(inner).keys() == before[name].keys()
        assert not inner._forward_hooks
        assert not inner._forward_pre_hooks
        assert not inner._forward_hooks_always_called


def test_layers_that_a_micro_batch_leaves_out_hold_nobody_up() -> None:
    """As with stochastic depth: each micro-batch takes another way, or none at all."""
    generator = np.random.default_rng(0)

    def forward(self: Any, x: Tensor) -> Any:
        h = self.embed(x)
        for block in self.blocks:
            if self.training and generator.random() < 0.5:
                continue
            h = block(h)
        return h

    module = Blocks(forward)
    run = Pipeline(
        Cutter(module, module.forward, 2, ["blocks.3"]), Splitter(), DEVICES, chunks=Chunks(2, 8)
    )
    module.eval()
    with torch.no_grad():
        run(data(16, 6))
    module.train()
    try:
        for _ in range(10):
            run(data(16, 6)).sum().backward()
    finally:
        run.close()
    assert module.embed.weight.grad is not None


ONE_WAY = [skips, several_outputs, own_parameter_everywhere, asks_shapes]
ONE_WAY += [same_tensor_twice, complex_numbers, keyword_arguments_and_dicts, rearranged]


@pytest.mark.parametrize("forward", ONE_WAY, ids=lambda forward: forward.__name__)
def test_tensors_meet_on_the_device_that_computes_next(forward: Any) -> None:
    """With another device that every machine has: one without memory."""
    module = Blocks(forward)
    for later in (module.blocks[2], module.blocks[3], module.head):
        later.to("meta")
    cutter = Cutter(module, module.forward, 2, ["blocks.2"])
    cut = cutter.expected()
    assert cut is not None
    devices = [torch.device("cpu"), torch.device("meta")]
    traveller = Traveller(0, devices, _pass, _pass, _pass, _pass)
    with Units(cut.units, devices).attached(), traveller.entered():
        traveller.go(0)
        output = module(data(8, 6))
    assert [stay.stage for stay in traveller.stays] == [0, 1]
    tensors = [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)]
    assert tensors[0].device.type == "meta"
    first, second = (stay.segments[0] for stay in traveller.stays)
    assert {crossing.leaf.device.type for crossing in first.leaving} == {"meta"}
    assert not second.leaving


def _pass(*_: Any) -> None:
    """Nobody takes turns."""


def test_lists_that_a_recomputed_layer_adds_to_are_refused() -> None:
    class Adding(nn.Module):
        def forward(self, h: Tensor, kept: list[Tensor]) -> Tensor:
            kept.append(h * 2)
            return h

    def forward(self: Any, x: Tensor) -> Any:
        kept: list[Tensor] = []
        h = self.blocks[3](self.embed(x))
        return self.head(self.adding(h, kept) + sum(kept))

    module = Blocks(forward)
    module.adding = Adding()
    assert_same(module, data(8, 6), split_at="blocks.3")
    with (
        pipelined(module, split_at="blocks.3", checkpoint="always") as run,
        pytest.raises(RuntimeError, match="`Adding` adds to a list or dict among its arguments"),
    ):
        run(data(8, 6))


def test_caches_that_layers_write_to_are_written_to_once() -> None:
    class Cache:
        def __init__(self) -> None:
            self.sum: Any = 0

    class Writing(nn.Module):
        def forward(self, h: Tensor, cache: Cache) -> Tensor:
            cache.sum = cache.sum + h
            return h * cache.sum

    def forward(self: Any, x: Tensor) -> Any:
        cache = Cache()
        h = self.writing(self.embed(x), cache)
        return self.head(self.writing(self.blocks[3](h), cache))

    module = Blocks(forward)
    module.writing = Writing()
    for checkpointed in CHECKPOINTS:
        assert_same(module, data(8, 6), split_at="blocks.3", checkpoint=checkpointed)


def test_activations_go_without_the_garbage_collector() -> None:
    alive: list[weakref.ref[Any]] = []

    def forward(self: Any, x: Tensor) -> Any:
        h = self.blocks[3](self.embed(x))
        alive.append(weakref.ref(h))
        return self.head(h)

    module, x = Blocks(forward), data(8, 6)
    with pipelined(module, [x], split_at="blocks.3", chunks=2) as run:
        run(x)
        gc.collect()
        alive.clear()
        gc.disable()
        try:
            output = run(x)
            assert any(ref() is not None for ref in alive)
            del output
            assert all(ref() is None for ref in alive)
            with torch.no_grad():
                run(x)
            assert all(ref() is None for ref in alive)
        finally:
            gc.enable()


@pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["numpy", "python"])
def test_numbers_drawn_from_others_than_torch_are_told_of_once(
    draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.head(self.blocks[3](self.embed(x)) * draw())

    module, x = Blocks(forward), data(8, 6)
    with pipelined(module, [x], split_at="blocks.3") as run:
        for _ in range(2):
            run(x)
            module.eval()
    assert caplog.text.count("draws from NumPy's or Python's random generator") == 1


def test_errors_name_unit_stage_and_micro_batch() -> None:
    class Breaking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                raise ZeroDivisionError("here")
            return x

    module = Blocks(skips)
    module.blocks[3] = Breaking()
    with (
        pipelined(module, split_at="blocks.3", chunks=2, parity_check="off") as run,
        pytest.raises(ZeroDivisionError, match="here") as raised,
    ):
        run(data(7, 6))
    (note,) = raised.value.__notes__
    assert note == "(raised in stage 1 of 2 on cpu, micro-batch 1 of 2, in `blocks.3`)"
