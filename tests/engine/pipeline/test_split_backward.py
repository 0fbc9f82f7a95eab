"""Gradients of weights that come later than those of inputs."""

import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from pipelines import DEVICES, assert_same, data, pipelined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mgpu.engine.pipeline.profile.recording import Recording
from lightning_mgpu.engine.pipeline.profile.timeline import StageSpan


class Two(nn.Module):
    """A layer for the first stage, and anything for the second; maybe a module between them."""

    def __init__(
        self, second: nn.Module, features: int = 8, between: nn.Module | None = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, features), second
            self.between = between or nn.Identity()
            for parameter in second.parameters():
                nn.init.uniform_(parameter, -0.3, 0.3)
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.second(self.between(self.first(x)).tanh())


class Reshaped(nn.Module):
    """A layer that sees its input in another shape."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unflatten(1, self.shape))


class Weighted(nn.Module):
    """A function of an input and of a weight with a bias."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(*(shape or (5, 8))))
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


class Attention(nn.Module):
    """Attention of a sequence to itself, or to part of it."""

    def __init__(self, is_cross: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.is_cross = is_cross

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 4))
        other = x[:, :1] if self.is_cross else x
        output: Tensor = self.attention(x, other, other, need_weights=False)[0]
        return output


def image(layer: nn.Module) -> nn.Module:
    return Reshaped(layer, 2, 4, 6)


# Whether any gradient comes later.
LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "linear": (lambda: nn.Linear(8, 5), True),
    "no bias": (lambda: nn.Linear(8, 5, bias=False), True),
    "sequences": (lambda: Reshaped(nn.Linear(4, 5), 2, 4), True),
    "in a row": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)),
        True,
    ),
    "normalised": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()), True),
    "addmm": (lambda: Weighted(lambda x, w, b: torch.addmm(b, x, w), 8, 5), True),
    "matmul": (lambda: Weighted(lambda x, w, b: x @ w + b, 8, 5), True),
    "transposed": (lambda: Weighted(lambda x, w, b: x @ w.t() + b), False),
    "scaled": (lambda: Weighted(lambda x, w, b: torch.addmm(b, x, w, beta=0.5), 8, 5), False),
    "vector": (lambda: Weighted(lambda x, w, b: F.linear(x, w) + b.sum(), 8), False),
    "by name": (lambda: Weighted(lambda x, w, b: F.linear(input=x, weight=w, bias=b)), True),
    "einsum": (lambda: Weighted(lambda x, w, b: torch.einsum("ni,oi->no", x, w) + b), False),
    "used twice": (lambda: Weighted(lambda x, w, b: F.linear(F.linear(x, w, b) @ w, w, b)), True),
    "used otherwise, too": (lambda: Weighted(lambda x, w, b: F.linear(x, w, b) + w.sum(1)), True),
    "conv1d": (lambda: Reshaped(nn.Conv1d(2, 3, 2, stride=2, padding=1), 2, 4), True),
    "conv2d": (lambda: image(nn.Conv2d(2, 4, 3, padding=(1, 0), dilation=(1, 2), groups=2)), True),
    "conv2d same": (lambda: image(nn.Conv2d(2, 4, 3, padding="same")), False),
    "conv3d": (lambda: Reshaped(nn.Conv3d(1, 2, 2, bias=False), 1, 2, 4, 6), True),
    "transposed conv1d": (lambda: Reshaped(nn.ConvTranspose1d(2, 3, 2, stride=2), 2, 4), True),
    "transposed conv2d": (
        lambda: image(nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2, dilation=2)),
        True,
    ),
    "attention": (lambda: Attention(is_cross=False), True),
    "cross attention": (lambda: Attention(is_cross=True), True),
    "encoder": (
        lambda: Reshaped(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), 2, 4),
        True,
    ),
    "recurrent": (lambda: nn.GRUCell(8, 3), False),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)),
        False,
    ),
}


def features_of(name: str) -> int:
    return 48 if "conv2d" in name or "conv3d" in name else 8


@pytest.mark.parametrize("mode", ["never", "except_last", "always"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_one_device(name: str, mode: str) -> None:
    build, _ = LAYERS[name]
    assert_same(Two(build(), features_of(name)), data(10, 6), checkpoint=mode)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_weights_come_later(name: str) -> None:
    build, expected = LAYERS[name]
    deferred = _deferred(Two(build(), features_of(name)))
    tasks = [(span.stage, span.chunk) for span in deferred]
    stages = (0, 1) if expected else (0,)
    assert sorted(tasks) == [(stage, chunk) for stage in stages for chunk in range(4)]


def test_nothing_comes_later_if_so_wanted() -> None:
    assert not _deferred(Two(nn.Linear(8, 5)), defer_weight_gradients=False)


@pytest.mark.parametrize(("features", "is_deferred"), [(8, False), (2**12, True)])
def test_small_products_are_left_alone(features: int, is_deferred: bool) -> None:
    # 2 samples in each micro-batch, of 4096 features each.
    module = Two(nn.Linear(features, features), features)
    for _ in range(2):
        spans = _deferred(module, defer_weight_gradients="auto", parity_check="off")
        assert {span.stage for span in spans} == ({1} if is_deferred else set())


def test_recomputed_units_leave_gradients_in_every_step() -> None:
    module = Two(nn.Linear(8, 5))
    with pipelined(module, checkpoint="always") as run:
        for _ in range(3):
            run.recording = recording = Recording(DEVICES)
            run(data(8, 6)).sum().backward()
            assert "weights" in {span.kind for span in recording.timeline().spans}


@pytest.mark.parametrize("frozen", ["weight", "bias", "first"])
def test_frozen_parts_have_no_gradient(frozen: str) -> None:
    module = Two(nn.Linear(8, 5))
    owner = module.first if frozen == "first" else module.second
    for name, parameter in owner.named_parameters():
        parameter.requires_grad_(frozen not in (name, "first"))
    with pipelined(module) as run:
        run(data(8, 6)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None
    module(data(8, 6)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9)


def test_weight_of_both_stages_has_one_gradient() -> None:
    module = Two(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6, bias=False)))
    tied: Any = module.second
    tied[1].weight = nn.Parameter(module.first.weight.detach().t().clone())
    module.first.weight = tied[0].weight = nn.Parameter(torch.rand(8, 8, dtype=torch.float64))
    assert_same(module, data(10, 8))


def slope_of_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(F.linear(x, w, b).square().sum(), w, create_graph=True)
    return F.linear(x, w, b) + x @ slope.t()


def slope_of_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    inner = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.linear(inner, w, b).tanh().sum(), inner, create_graph=True)
    return F.linear(x + slope, w, b)


def checkpointed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda x: F.linear(x, w, b).tanh(), x, use_reentrant=False)
    return found


def packed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    def halved(tensor: Tensor) -> Tensor:
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(halved, halved):
        return F.linear(x, w, b).tanh()


def vectorised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: F.linear(row, w, b).tanh())(x)


def jacobian(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    each = torch.func.vmap(torch.func.jacrev(lambda row: F.linear(row, w, b).tanh()))(x)
    return each.sum(2)


def forward_slope(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: F.linear(x, w, b).tanh(), (x,), (torch.ones_like(x),))[1]


def partly_without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.linear(x, w, b)
    return F.linear(x, w, b) * target


def in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).mul_(2).relu_()


@pytest.mark.parametrize(
    "function",
    [
        *(slope_of_input, checkpointed, packed, vectorised, jacobian, forward_slope),
        *(partly_without_gradient, in_place),
    ],
    ids=lambda function: function.__name__,
)
def test_what_else_looks_at_gradients_sees_them(function: Any) -> None:
    assert_same(Two(Weighted(function)), data(10, 6))


def test_gradient_of_a_weight_within_forward_is_there_at_once() -> None:
    assert_same(Two(Weighted(slope_of_weight)), data(10, 6), chunks=1)


def test_hooks_of_a_parameter_run_once_a_batch() -> None:
    module = Two(nn.Linear(8, 5))
    seen: list[Tensor] = []
    module.second.weight.register_hook(seen.append)
    with pipelined(module) as run:
        run(data(8, 6)).sum().backward()
    (gradient,) = seen
    assert torch.equal(gradient, module.second.weight.grad)


def test_second_backward_adds_the_same_again() -> None:
    module = Two(nn.Linear(8, 5))
    with pipelined(module) as run:
        loss = run(data(8, 6)).square().sum()
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in module.parameters()]
        loss.backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=0, atol=1e-12)


class Slow(nn.Module):
    """Takes a while in backward, now and then."""

    seconds: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(lambda _: time.sleep(self.seconds.pop() if self.seconds else 0))
        return x * 1


def test_who_waits_for_whom_changes_no_bit() -> None:
    found = []
    for seconds in ([], [0.02] * 4, [0.0, 0.05, 0.0, 0.05]):
        second = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
        module = Two(second, between=Slow()).float()
        Slow.seconds = list(seconds)
        with pipelined(module, parity_check="off") as run:
            run(data(64, 6).float()).square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


class Failing(nn.Module):
    """Fails in backward, as long as it is told to."""

    fails = True

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(self._check)
        return x * 1

    def _check(self, gradient: Tensor) -> None:
        if self.fails:
            raise RuntimeError("no more")


def test_error_between_the_halves_leaves_nothing_behind() -> None:
    failing = Failing()
    module = Two(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), between=failing)
    with pipelined(module) as run:
        with pytest.raises(RuntimeError, match="no more"):
            run(data(8, 6)).square().sum().backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        failing.fails = False
        run(data(8, 6)).square().sum().backward()
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    module(data(8, 6)).square().sum().backward()
    for gradient, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-9)


def test_backward_within_autocast_gives_the_same() -> None:
    module = Two(nn.Linear(8, 5)).float()
    found = []
    for defers in (False, True):
        module.zero_grad()
        with pipelined(module, defer_weight_gradients=defers) as run:
            loss = run(data(8, 6).float()).square().sum()
            with torch.autocast("cpu", torch.bfloat16):
                loss.backward()
        found.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def no_features(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[:, :0], w[:, :0], b) + F.linear(x[:0], w, b).sum() + F.linear(x, w, b)


def test_empty_products_have_gradients() -> None:
    assert_same(Two(Weighted(no_features)), data(10, 6))
    assert_same(Two(nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 5))), data(10, 6))


def test_wrong_arguments_are_told_as_without_a_pipeline() -> None:
    module = Two(Weighted(lambda x, w, b: F.linear(x.sum(), w, b)))
    with pytest.raises(RuntimeError) as expected:
        module(data(8, 6))
    with pipelined(module) as run, pytest.raises(RuntimeError) as raised:
        run(data(8, 6))
    assert str(expected.value) in str(raised.value)


AUTOCAST = ("linear", "no bias", "normalised", "addmm", "conv2d", "transposed conv1d", "encoder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_same(name: str, dtype: torch.dtype) -> None:
    module = Two(LAYERS[name][0](), features_of(name)).float()
    found, outputs = [], []
    for defers in (False, True):
        module.zero_grad()
        with pipelined(module, defer_weight_gradients=defers) as run:
            run.recording = recording = Recording(DEVICES)
            with torch.autocast("cpu", dtype):
                output = run(data(8, 6).float())
            output.float().square().sum().backward()
        kinds = {span.kind for span in recording.timeline().spans}
        assert ("weights" in kinds) == defers
        outputs.append(output)
        found.append([parameter.grad for parameter in module.parameters()])
    assert torch.equal(*outputs)
    # (Sums over the bias of a convolution in float16 round otherwise.)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*found, rtol=eps, atol=eps)


def test_autocast_leaves_float64_alone() -> None:
    module = Two(nn.Linear(8, 5))
    with pipelined(module) as run, torch.autocast("cpu", torch.bfloat16):
        output = run(data(8, 6))
    assert output.dtype == module(data(8, 6)).dtype == torch.float64


def test_autocast_refuses_a_mix_as_without_a_pipeline() -> None:
    module = Two(nn.Linear(8, 5))
    module.first.float()
    with torch.autocast("cpu", torch.bfloat16), pipelined(module) as run:
        for forward in (module, run):
            with pytest.raises(RuntimeError, match="dtype"):
                forward(data(8, 6).float())


def _deferred(module: nn.Module, **options: Any) -> list[StageSpan]:
    with pipelined(module, **options) as run:
        run.recording = recording = Recording(DEVICES)
        output = run(data(8, 6))
        output.sum().backward()
    return [span for span in recording.timeline().spans if span.kind == "weights"]
