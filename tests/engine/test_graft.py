"""Work done apart, as one node of the caller's graph."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mgpu.engine.autograd import graft


class Work:
    """``outputs = [sum(x) * w, max(w)]``, computed apart."""

    def __init__(self) -> None:
        self.x = torch.tensor([1.0, 2.0], requires_grad=True)
        self.w = torch.tensor([3.0, 4.0, 5.0], requires_grad=True)
        self.calls: list[tuple[Any, bool]] = []

    def outputs(self) -> list[Tensor]:
        x, w = (t.detach().requires_grad_() for t in (self.x, self.w))
        inside = [x.sum() * w, w.max()]

        def backward(gradients: Sequence[Tensor | None], keep: bool) -> Sequence[Tensor | None]:
            self.calls.append(([g is not None for g in gradients], keep))
            pairs = [(o, g) for o, g in zip(inside, gradients, strict=True) if g is not None]
            outputs, seeds = zip(*pairs, strict=True)
            return torch.autograd.grad(outputs, [x, w], seeds, retain_graph=keep, allow_unused=True)

        return graft(inside, [self.x, self.w], backward)


def test_values_and_gradients_are_those_of_the_work() -> None:
    work = Work()
    scaled, largest = work.outputs()
    assert scaled.tolist() == [9, 12, 15]
    (scaled.sum() * 2 + largest).backward()
    assert work.x.grad is not None
    assert work.x.grad.tolist() == [24, 24]
    assert work.w.grad is not None
    assert work.w.grad.tolist() == [6, 6, 7]
    assert work.calls == [([True, True], False)]


def test_output_without_a_gradient_is_told_apart() -> None:
    work = Work()
    work.outputs()[1].backward()
    assert work.x.grad is None
    assert work.calls == [([False, True], False)]


def test_gradients_accumulate_and_hooks_fire_once() -> None:
    work = Work()
    fired: list[Tensor] = []
    work.w.register_hook(lambda gradient: fired.append(gradient))
    for _ in range(2):
        work.outputs()[0].sum().backward()
    assert work.w.grad is not None
    assert work.w.grad.tolist() == [6, 6, 6]
    assert len(fired) == 2


def test_gradients_of_chosen_inputs() -> None:
    work = Work()
    (gradient,) = torch.autograd.grad(work.outputs()[0].sum(), work.x)
    assert gradient.tolist() == [12, 12]
    assert work.w.grad is None


def test_backward_of_backward_is_refused() -> None:
    work = Work()
    with pytest.raises(RuntimeError, match=r"create_graph=True"):
        torch.autograd.grad(work.outputs()[0].sum(), work.x, create_graph=True)


def test_second_backward_needs_the_graph_to_be_kept() -> None:
    work = Work()
    loss = work.outputs()[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert work.x.grad is not None
    assert work.x.grad.tolist() == [24, 24]
    assert [keep for _, keep in work.calls] == [True, False]
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_nothing_is_recorded_without_gradients() -> None:
    work = Work()
    with torch.no_grad():
        assert not work.outputs()[0].requires_grad
    work.x.requires_grad_(False)
    work.w.requires_grad_(False)
    frozen = [torch.ones(1)]
    assert not graft(frozen, [work.x, work.w], lambda g, k: [None, None])[0].requires_grad


def test_integers_are_no_part_of_the_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    index, value = graft(
        [torch.tensor(3), torch.ones(2)], [x], lambda gradients, keep: [gradients[0]]
    )
    assert not index.requires_grad
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


def test_graph_that_is_dropped_lets_go_of_the_work() -> None:
    work = Work()
    outputs = work.outputs()
    node = weakref.ref(outputs[0].grad_fn.next_functions[0][0])  # type: ignore[union-attr]
    kept = weakref.ref(work)
    del outputs, work
    gc.collect()
    assert node() is None
    assert kept() is None


def test_error_in_backward_reaches_the_caller() -> None:
    x = torch.ones(2, requires_grad=True)

    def backward(*_: Any) -> Any:
        raise ArithmeticError("broken")

    (output,) = graft([torch.ones(2)], [x], backward)
    with pytest.raises(ArithmeticError, match="broken"):
        output.sum().backward()
