"""Copies for trial runs share nothing that a run could change."""

import itertools
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mgpu.engine.data_parallel.copying.isolation import Isolation, UnsafeError
from lightning_mgpu.engine.data_parallel.replicas import Replicas

CPU = torch.device("cpu")


class Point(NamedTuple):
    x: Any
    y: Any


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Thing:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def add(self, value: Any) -> None:
        self.values.append(value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "change", "read"),
    [
        (torch.zeros(2), lambda v: v.add_(1), lambda v: v.tolist()),
        (np.zeros(2), lambda v: v.__iadd__(1), lambda v: v.tolist()),
        ([0], lambda v: v.append(1), list),
        ({"a": [0]}, lambda v: v["a"].append(1), str),
        (({"a": 0},), lambda v: v[0].update(a=1), str),
        (deque([0], 3), lambda v: v.append(1), list),
        (defaultdict(list), lambda v: v["a"].append(1), dict),
        (OrderedDict(a=0), lambda v: v.update(a=1), dict),
        (Counter("a"), lambda v: v.update("b"), dict),
        (Point(torch.zeros(1), 0), lambda v: v.x.add_(1), str),
        (Slotted(torch.zeros(1)), lambda v: v.value.add_(1), lambda v: v.value.item()),
        (Thing(values=[0]), lambda v: v.add(1), lambda v: v.values),
        (Thing(values=[0]).add, lambda v: v(1), lambda v: v.__self__.values),
        (Thing(t=Thing(values=[0])), lambda v: v.t.add(1), lambda v: v.t.values),
        (itertools.count(), next, repr),
        (iter([1, 2, 3]), next, lambda v: v.__length_hint__()),
        (torch.Generator(), lambda v: torch.rand(1, generator=v), lambda v: v.get_state().tolist()),
        (np.random.default_rng(0), lambda v: v.random(), lambda v: str(v.bit_generator.state)),
    ],
)
def test_change_of_a_copy_does_not_reach_the_original(value: Any, change: Any, read: Any) -> None:
    before = read(value)
    new = Isolation()(value)
    assert type(new) is type(value)
    assert read(new) == before
    change(new)
    assert read(value) == before
    assert read(new) != before


def test_references_stay_the_same_within_a_copy() -> None:
    tensor = torch.zeros(2)
    thing = Thing(values=[tensor], tensor=tensor)
    isolation = Isolation()
    a, b = isolation([thing, tensor]), isolation(tensor)
    assert a[0].tensor is a[0].values[0] is a[1] is b is not tensor


def test_what_may_be_shared_is() -> None:
    module, lock = nn.Linear(1, 1), threading.Lock()
    loader = DataLoader(TensorDataset(torch.zeros(3)))
    shared = Thing(loader=loader)
    isolation = Isolation(is_shared=lambda value: value is shared)
    for value in (module, lock, loader, shared, "text", len, test_what_may_be_shared_is):
        assert isolation(value) is value
    holder = isolation(Thing(module=module, loader=loader, shared=shared))
    assert (holder.module, holder.loader, holder.shared) == (module, loader, shared)


@pytest.mark.parametrize(
    "value",
    [iter(DataLoader(TensorDataset(torch.zeros(3)))), (i for i in range(3)), memoryview(b"ab")],
    ids=["loader", "generator", "view"],
)
def test_what_cannot_be_copied_refuses_to_be_used(value: Any) -> None:
    new = Isolation()(value)
    with pytest.raises(UnsafeError, match=f"cannot be copied, a `{type(value).__name__}`"):
        next(new)
    with pytest.raises(UnsafeError, match="cannot be copied"):
        new.set()
    with pytest.raises(UnsafeError, match="cannot be copied"):
        new.value = 1


def test_large_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mgpu.engine.data_parallel.copying.isolation._MAX_BYTES", 2**20)
    with pytest.raises(UnsafeError, match="more than 1 MiB"):
        Isolation()([torch.zeros(2**17), np.zeros(2**17)])


def test_use_of_a_copied_generator_is_known() -> None:
    isolation = Isolation()
    generator = isolation(torch.Generator())
    assert not isolation.drew()
    torch.rand(1, generator=generator)
    assert isolation.drew()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.layers = [self.linear]
        self.pair = (torch.zeros(1), [0])
        self.register_buffer("count", torch.zeros(()))


def test_sandbox_shares_no_memory_with_the_master() -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make = Replicas(model, [CPU, CPU]).sandboxes()
    first, second = make().module, make().module
    assert first.layers[0] is first.linear is not model.linear
    for tensor in (*first.parameters(), *first.buffers(), first.pair[0]):
        tensor.data.add_(1)
    first.pair[1].append(1)
    first.norm(torch.randn(4, 2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in second.state_dict().items())
    assert (model.pair[0].item(), model.pair[1]) == (0, [0])


def test_sandbox_in_double_precision_leaves_the_master_alone() -> None:
    model = Model()
    sandbox = Replicas(model, [CPU]).sandboxes()()
    sandbox.to_double()
    tensors = (*sandbox.module.parameters(), sandbox.module.count)
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert sandbox.module.linear(torch.zeros(1, 2).double()).dtype == torch.float64


@pytest.mark.parametrize("everything", [False, True])
def test_sandbox_in_evaluation_leaves_the_master_alone(everything: bool) -> None:
    model = Model()
    sandbox = Replicas(model, [CPU]).sandboxes()()
    sandbox.calm(everything)
    assert not sandbox.module.norm.training
    assert sandbox.module.linear.training is not everything
    assert model.norm.training
