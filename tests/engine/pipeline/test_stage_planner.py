"""Stages per device chosen by simulation, from costs that are given."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.hand_over import hand_over_seconds
from lightning_mgpu.engine.pipeline.partition import observation
from lightning_mgpu.engine.pipeline.partition.choice import choose
from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, Measured, measured
from lightning_mgpu.engine.pipeline.partition.observation import registered
from lightning_mgpu.engine.pipeline.partition.stage_planner import Chosen, Deal, StagePlanner


def _module(seconds: Sequence[float]) -> Measured:
    """A row of layers, of which a third of the time is for forward and one for weights."""
    called = registered(nn.Sequential(*(nn.Tanh() for _ in seconds)))
    costs = {
        str(layer): Cost(s, 0, 0, s / 3, s / 3, 100 * (layer + 1))
        for layer, s in enumerate(seconds)
    }
    return Measured(called, {"": Cost(), **costs})


def _dealt(price: Any) -> Deal:
    """Layers in stages with about as much of a price, or of seconds."""

    def deal(measured: Measured, _: int, stages: int) -> Any:
        return choose(measured.called, stages, price or (lambda n: measured.costs[n].seconds))

    return deal


def _chosen(
    seconds: Sequence[float],
    hand_over: float,
    numbers: Sequence[int] = (1, 2, 3, 4),
    chunks: int = 8,
    price: Any = None,
    **options: Any,
) -> Chosen:
    planner = StagePlanner(
        devices=2, numbers=numbers, hand_over=lambda _: hand_over, free=price is None, **options
    )
    found = planner.chosen({chunks: _module(seconds)}, _dealt(price))
    assert found is not None
    return found


def _seconds(found: Chosen) -> list[float]:
    return [candidate.seconds for candidate in found.candidates]


def test_more_stages_win_where_handing_over_costs_little() -> None:
    found = _chosen([1.0] * 8, 0.001, numbers=[1, 2])
    assert found.best.stages_per_device == 2
    assert found.best.starts == ("2", "4", "6")
    # Two devices and eight micro-batches: a wait of two thirds of a stage, or half of that.
    assert _seconds(found) == pytest.approx([32 + 8 / 3, 32 + 4 / 3], rel=1e-3)


def test_one_stage_wins_where_handing_over_costs_much() -> None:
    found = _chosen([1.0] * 8, 1.0)
    assert found.best == found.candidates[0]
    assert found.best.starts == ("4",)
    assert _seconds(found) == sorted(_seconds(found))


def test_one_stage_wins_where_layers_cannot_be_dealt_out_evenly() -> None:
    found = _chosen([0.1, 3.9, 3.9, 0.1], 0.0, numbers=[1, 2])
    assert found.best.stages_per_device == 1


def test_fewest_of_about_equal_ones_are_taken() -> None:
    found = _chosen([1.0] * 24, 0.0, chunks=64)
    quickest = min(_seconds(found))
    assert found.best.stages_per_device == 1
    assert quickest < found.best.seconds < 1.02 * quickest


# Few cuts, of which all are tried, and more than can be.
@pytest.mark.parametrize(
    "seconds", [[3.0, 3.0, 2.0, 5.0, 3.0, 4.0, 3.0], [1.0 + n * n * 5 % 7 for n in range(20)]]
)
@pytest.mark.parametrize("checkpoint", ["never", "except_last", "always"])
def test_stages_begin_where_a_step_is_shortest(seconds: list[float], checkpoint: Any) -> None:
    # What counts is not the largest stage, but what the stages of a device take together.
    _, costs = _module(seconds)

    def price(name: str) -> float:
        return costs[name].seconds

    options: Any = {"numbers": [2], "checkpoint": checkpoint}
    by_largest = _chosen(seconds, 0.01, price=price, **options)
    simulated = _chosen(seconds, 0.01, **options)
    assert simulated.best.seconds < by_largest.best.seconds


def test_what_is_computed_again_counts() -> None:
    never, last, always = (
        _seconds(_chosen([1.0] * 4, 0.1, checkpoint=checkpoint))[0]
        for checkpoint in ("never", "except_last", "always")
    )
    assert never < last < always


def test_hand_over_is_measured_once_with_what_most_layers_get() -> None:
    sizes: list[float] = []

    def hand_over(size: float) -> float:
        sizes.append(size)
        return 0.0

    planner = StagePlanner(devices=2, numbers=[1, 2], hand_over=hand_over)
    planner.chosen({8: _module([1.0] * 5)}, _dealt(None))
    assert sizes == [300]


def test_numbers_for_which_there_are_too_few_layers_are_left_out() -> None:
    found = _chosen([1.0] * 5, 0.0)
    assert [candidate.stages_per_device for candidate in found.candidates] == [1, 2]
    planner = StagePlanner(devices=2, numbers=[1], hand_over=lambda _: 0.0)
    assert planner.chosen({8: _module([1.0])}, _dealt(None)) is None


def test_what_others_have_chosen_is_taken() -> None:
    theirs = _chosen([1.0] * 8, 1.0)
    assert _chosen([1.0] * 8, 0.0, share=lambda _: theirs) is theirs


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x)[0] @ torch.ones(8, 8))


@pytest.mark.parametrize(("least", "share"), [(0, 1), (None, 0), (2**40, 0), (500, 12 / 17)])
def test_gradients_of_large_weights_are_half_of_backward(least: int | None, share: float) -> None:
    # Of 6 entries: 24 x 8 and 8 x 8 multiplications each for attention, 8 x 2 for the last.
    module = _Attending()
    _, costs = measured(module, lambda: module(torch.ones(6, 1, 8)), least)
    backward = costs["last"].seconds - costs["last"].forward
    assert backward > 0
    assert costs["last"].weights == pytest.approx(backward * share / 2)
    # The caller's tensor counts once for each argument that it is.
    assert [costs[name].received for name in ("attention", "last")] == [3 * 6 * 8 * 4, 6 * 8 * 4]


def test_layers_cost_together_what_calls_them_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Works(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: Tensor) -> Tensor:
            nonlocal now
            now += self.seconds
            return x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Sequential(Works(1), Works(2)), Works(3)
            self.between = [Works(0.5), Works(0.25), Works(1)]

        def forward(self, x: Tensor) -> Tensor:
            before, between, after = (work.forward for work in self.between)
            return after(self.last(between(self.first(before(x)))))

    monkeypatch.setattr(observation, "time", SimpleNamespace(perf_counter=lambda: now))
    module = Net()
    _, costs = measured(module, lambda: module(torch.ones(1)))
    # What is computed before the first layer counts as its own, as what comes after a layer does.
    expected = {"": 7.75, "first": 3.75, "first.0": 1.5, "first.1": 2.25, "last": 4}
    assert {name: cost.seconds for name, cost in costs.items()} == expected


@pytest.mark.parametrize("devices", [1, 2, 3, 10])
def test_handing_over_is_measured(devices: int) -> None:
    state = torch.get_rng_state()
    seconds = hand_over_seconds([torch.device("cpu")] * devices, 1, 1e4)
    assert 0 <= seconds < 1
    assert torch.equal(torch.get_rng_state(), state)
