"""Memory of devices, from costs that are given."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.partition.layer_costs import Cost, measured
from lightning_mgpu.engine.pipeline.partition.memory import (
    MemoryLimit,
    MemoryModel,
    Weight,
)
from lightning_mgpu.format import parsed_bytes

CHUNKS = 4


def _model(
    size: float,
    weights: Sequence[dict[int, Weight]] = ({},) * 4,
    inputs: Sequence[dict[int, int]] = ({0: 1}, {1: 1}, {2: 1}, {3: 1}),
    devices: int = 2,
    others: float = 0,
    **whole: Any,
) -> MemoryModel:
    """Four layers, each of which keeps 10 bytes of a micro-batch and is called with one."""
    costs = {
        str(n): Cost(forward=1.0 + n, activations=10, received=1, inputs=inputs[n])
        for n in range(4)
    }
    costs[""] = Cost(**whole)
    every = {key: w for of_layer in weights for key, w in of_layer.items()}

    def weights_of(name: str) -> dict[int, Weight]:
        return weights[int(name)] if name else every

    limit = MemoryLimit(size, weights_of, others)
    return MemoryModel(limit, costs, [str(n) for n in range(4)], devices, CHUNKS)


@pytest.mark.parametrize(
    ("size", "checkpoint", "activations"),
    [
        (80, ("never", "never"), (80, 80)),
        # Inputs of both layers of all micro-batches but one, and that one, which is over first.
        (79, ("except_last", "except_last"), (3 * 2 + 20,) * 2),
        (25, ("always", "always"), (4 * 2 + 11,) * 2),
        (5, ("always", "always"), (4 * 2 + 11,) * 2),
    ],
)
def test_as_little_as_possible_is_computed_again(
    size: int, checkpoint: Any, activations: tuple[int, ...]
) -> None:
    model = _model(size)
    found = model.fitted([0, 2, 4], ["never", "never"])
    assert found.checkpoint == checkpoint
    assert tuple(device.activations for device in found.devices) == activations
    assert model.excess(found.devices) == pytest.approx(max(0, activations[0] / size - 1))


def test_stages_of_a_device_share_its_memory() -> None:
    # On each device two stages of a layer each, of which the first is quicker to compute again.
    found = _model(60).fitted([0, 1, 2, 3, 4], ["never"] * 4)
    assert found.checkpoint == ("except_last", "except_last", "never", "never")
    assert {device.activations for device in found.devices} == {3 + 11 + 40}


def test_what_is_wanted_is_computed_again_anyway() -> None:
    found = _model(1000).fitted([0, 2, 4], ["always", "never"])
    assert found.checkpoint == ("always", "never")


def test_memory_that_several_layers_are_called_with_counts_once() -> None:
    mask = [{0: 1, 9: 5}, {1: 1, 9: 5}, {2: 1, 9: 5}, {3: 1, 9: 5}]
    found = _model(1, inputs=mask).fitted([0, 2, 4], ["always"] * 2)
    assert found.devices[0].activations == 4 * (2 + 5) + 11


def test_weights_lie_with_the_first_stage_that_uses_them() -> None:
    tied, own = Weight(3, 12), Weight(1, 4)
    weights = [{0: tied, 1: own}, {2: own}, {3: own}, {0: tied}]
    taken = [d.weights for d in _model(1e3, weights).fitted([0, 2, 4], ["never"] * 2).devices]
    assert taken == [12 + 4 + 4, 4 + 2 * 3]
    # Both stages that use it lie on the first device.
    around = _model(1e3, weights).fitted([0, 1, 3, 4], ["never"] * 3)
    assert [device.weights for device in around.devices] == [12 + 4, 4 + 4]


def test_first_device_has_what_is_in_no_layer_and_the_output() -> None:
    model = _model(1e3, others=7, returned=5)
    (first, second) = model.fitted([0, 2, 4], ["never"] * 2).devices
    assert first.weights - second.weights == 7
    assert first.activations - second.activations == 3 * CHUNKS * 5


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).sigmoid() + x)


def test_what_is_kept_between_layers_counts_with_the_one_before() -> None:
    module, x = _Residual(), torch.ones(5, 8)
    _, costs = measured(module, lambda: module(x))
    # The input, and what `sigmoid` keeps of its output; the sum, which is the next one's input.
    assert [costs[name].activations for name in ("first", "last")] == [2 * x.nbytes, x.nbytes]
    assert costs[""].activations == 3 * x.nbytes
    assert costs[""].returned == x.nbytes
    assert {*costs["first"].inputs.values()} == {x.nbytes}
    assert costs["first"].inputs.keys().isdisjoint(costs["last"].inputs)


class _Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(100, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).chunk(3, -1)
        return self.last(q * k * v * self.mask[: len(x)])


def test_views_that_are_kept_hold_on_to_all_of_their_memory() -> None:
    module, x = _Views(), torch.ones(5, 8)
    _, costs = measured(module, lambda: module(x))
    # The input; queries, keys and values in one piece, and the product of the first two. The mask
    # belongs to the module.
    assert costs["first"].activations == (1 + 3 + 1) * x.nbytes
    assert costs["last"].activations == x.nbytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8e9),
        ("1.5 GiB", 1.5 * 2**30),
        ("500 mb", 5e8),
        ("12kB", 12e3),
        ("100", 100),
        (".5T", 5e11),
        ("much", None),
        ("GB", None),
        ("-1GB", None),
        ("1 GBit", None),
    ],
)
def test_sizes(text: str, size: float | None) -> None:
    assert parsed_bytes(text) == size
