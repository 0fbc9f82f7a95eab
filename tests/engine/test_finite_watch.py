"""What becomes of values that are not finite is followed to where they came from."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mgpu.engine.error_notes import noted
from lightning_mgpu.engine.finite_watch import FiniteWatch, not_finite
from lightning_mgpu.engine.workers import Workers

CPU = torch.device("cpu")


def traced(module: nn.Module, x: Tensor, **given: Tensor) -> str | None:
    watch = FiniteWatch({id(m): name for name, m in module.named_modules()}, given)
    with watch.watching():
        output = module(x)
    assert not_finite(output) is not None
    trace = watch.trace(output)
    return None if trace is None else str(trace)


class Masked(nn.Module):
    """Masks with -Inf, of which softmax makes 0, and goes wrong elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(2, 2, dtype=torch.bool).triu(1)
        weights = torch.zeros(2, 2).masked_fill(mask, float("-inf")).softmax(-1)
        return (weights @ x).sub(9).sqrt()


def test_mask_of_infinities_is_passed_over() -> None:
    found = traced(nn.Sequential(nn.Identity(), Masked()), torch.ones(2, 2))
    assert found == "NaN by `sqrt` in `1`, in forward (test_finite_watch.py:30)"


def test_row_that_is_masked_altogether_is_not() -> None:
    class AllMasked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((2, 2), float("-inf")).softmax(-1) @ x

    found = traced(AllMasked(), torch.ones(2, 2))
    assert found is not None
    assert found.startswith("Inf by `full` in ``, in forward")
    assert "of it became NaN by `_softmax`" in found


def test_given_tensors_are_named() -> None:
    x = torch.tensor([[1.0, float("nan")]])
    assert traced(nn.Linear(2, 1), x, **{"the batch": x}) == "NaN is in the batch already"


def test_writes_in_place_to_lists_are_seen() -> None:
    into, bad = [torch.zeros(2)], [torch.ones(2)]
    watch = FiniteWatch({}, {})
    with watch.watching():
        torch._foreach_add_(into, [torch.log(bad[0] - 1)])
    assert "Inf by `log`" in str(watch.trace(into[0]))


def test_threads_are_watched_and_say_where_they_are() -> None:
    workers = Workers([CPU, CPU])
    net = nn.Sequential(nn.Tanh(), nn.Softplus())
    watch = FiniteWatch({id(module): name for name, module in net.named_modules()}, {})

    def task(number: int) -> Any:
        with noted(f"part {number}"):
            return net(torch.ones(2)) / (1 - number)

    with watch.watching():
        first, second = workers.run([lambda: task(0), lambda: task(1)])
    workers.close()
    assert watch.trace(first) is None
    trace = str(watch.trace(second))
    assert trace.startswith("Inf by `div` outside of submodules, in forward (test_finite_watch.py:")
    assert trace.endswith("), part 1")


def test_gradient_within_forward_is_told_as_one() -> None:
    class Penalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(x.sqrt().sum(), x, create_graph=True)
            return gradient

    found = traced(nn.Sequential(Penalised()), torch.zeros(2))
    assert found is not None
    assert found.startswith("Inf by `SqrtBackward0`, in backward")
