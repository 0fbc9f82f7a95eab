"""Replicas of modules: what they share, what they have of their own, and what comes back."""

import functools
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.data_parallel.copying.structure import MAX_CONTAINER
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.parameter_leaves import set_data
from lightning_mgpu.engine.workers import Workers

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("nothing", None)
        self.data = object()
        self.scalar = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers([CPU, CPU])
    yield made
    made.close()


def replicas(net: nn.Module, **kwargs: Any) -> Replicas:
    return Replicas(net, [CPU, CPU], **kwargs)


def copy_of(net: nn.Module, **kwargs: Any) -> Any:
    """The copy of a module, as a step finds it."""
    with replicas(net, **kwargs).step(2) as (_, copied):
        return copied


def test_parameters_share_memory_and_all_else_is_shared_or_copied() -> None:
    net = Net()
    copied = copy_of(net)
    assert type(copied) is Net
    assert copied is not net
    assert copied.first is not net.first
    assert copied.first.weight is not net.first.weight
    assert copied.first.weight.data_ptr() == net.first.weight.data_ptr()
    assert copied.data is net.data
    assert copied.scale is not net.scale
    assert copied.nothing is None
    assert list(copied.state_dict()) == list(net.state_dict())


def test_tied_parameters_and_modules_stay_tied() -> None:
    net = Net()
    net.third = nn.Linear(3, 3)
    net.third.weight = net.first.weight
    net.fourth = net.first
    copied = copy_of(net)
    assert copied.third.weight is copied.first.weight
    assert copied.fourth is copied.first


def test_references_lead_to_the_copy() -> None:
    net = Net()

    class Helper:
        def __init__(self, module: nn.Module) -> None:
            self.module = module
            self.name = "helper"

    net.helper = Helper(net.second)
    net.layers = [net.first, (net.second, {"deep": net.first.weight})]
    net.method = net.second.forward
    net.part = functools.partial(net.method, torch.ones(3))
    net.me = OrderedDict(me=net)
    net.weak = weakref.ref(net)
    copied = copy_of(net)
    assert copied.helper is not net.helper
    assert copied.helper.module is copied.second
    assert copied.helper.name == "helper"
    assert copied.layers[0] is copied.first
    assert copied.layers[1][0] is copied.second
    assert copied.layers[1][1]["deep"] is copied.first.weight
    assert copied.method.__self__ is copied.second
    assert copied.part.func.__self__ is copied.second
    assert copied.me["me"] is copied


def test_hooks_run_on_the_copy() -> None:
    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.register_forward_hook(self.hook)
            self.seen: list[Any] = []

        def hook(self, *_: Any) -> None:
            self.seen.append(self)

    net = Hooked()
    with replicas(net).step(2) as (_, copied):
        copied(torch.ones(1, 3))
        assert copied.seen == [copied]


def test_master_is_patched_in_the_step_only() -> None:
    net = Net()
    net.layers = [net.first.weight, (net.second.weight, 1)]
    weights = net.first.weight, net.second.weight
    made = replicas(net)
    with made.step(2) as (master, _):
        assert master is net
        assert net.first.weight is not weights[0]
        assert net.layers[0] is net.first.weight
        assert net.layers[1][0] is net.second.weight
        with made.as_outside(2):
            assert net.first.weight is weights[0]
        assert net.first.weight is not weights[0]
    assert (net.first.weight, net.second.weight) == weights
    assert net.layers == [weights[0], (weights[1], 1)]


def test_master_is_restored_after_an_error() -> None:
    net = Net()
    weight = net.first.weight

    def fail() -> None:
        with replicas(net).step(2, [{"extra": 1}, {}]):
            assert net.extra == 1
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fail()
    assert net.first.weight is weight
    assert not hasattr(net, "extra")


def test_gradients_of_all_slots_are_summed(workers: Workers) -> None:
    net, made = Net(), None
    made = replicas(net)
    x = torch.randn(4, 3)
    with made.step(2) as modules:
        for module, part in zip(modules, x.chunk(2), strict=True):
            module(part).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    sums = made.take_gradients(workers, 2)
    net(x).sum().backward()
    for total, parameter in zip(sums, made.parameters, strict=True):
        torch.testing.assert_close(total, parameter.grad)
    assert made.take_gradients(workers, 2) == [None] * len(sums)


def test_large_gradients_are_summed_on_all_workers(workers: Workers) -> None:
    net = nn.ModuleList([nn.Linear(700, 600), nn.Linear(2, 2), nn.Linear(3, 3)])
    made = replicas(net)
    inputs = torch.ones(1, 700), torch.ones(1, 2), torch.ones(1, 3)
    with made.step(2) as modules:
        for slot, module in enumerate(modules, start=1):
            for layer, x in zip(module, inputs, strict=True):
                (layer(x).sum() * slot).backward()
    for total, parameter in zip(made.take_gradients(workers, 2), net.parameters(), strict=True):
        torch.testing.assert_close(total, torch.full_like(parameter, 3.0))


def test_gradients_of_parameters_that_only_some_slots_use(workers: Workers) -> None:
    net = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(3)])
    made = replicas(net)
    with made.step(2) as (first, second):
        first[0](torch.ones(1, 2)).sum().backward()
        second[1](torch.ones(1, 2)).sum().backward()
    totals = made.take_gradients(workers, 2)
    assert [total is not None for total in totals] == [True, True, False]


def test_sparse_gradients(workers: Workers) -> None:
    net = nn.Embedding(5, 2, sparse=True)
    made = replicas(net)
    with made.step(2) as modules:
        for index, module in enumerate(modules):
            module(torch.tensor([1, index])).sum().backward()
    (total,) = made.take_gradients(workers, 2)
    assert total is not None
    assert total.is_sparse
    assert total.to_dense()[:, 0].tolist() == [1, 3, 0, 0, 0]


@pytest.mark.parametrize("own_memory", [False, True])
def test_memory_of_ones_own_follows_the_master(own_memory: bool, workers: Workers) -> None:
    net = Net()
    net.small = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    made = replicas(net, own_memory=own_memory)
    for value in (1.0, 2.0):
        with torch.no_grad():
            net.first.weight.fill_(value)
        with made.step(2) as (_, copied):
            shared = copied.first.weight.data_ptr() == net.first.weight.data_ptr()
            assert shared is not own_memory
            assert copied.first.weight.unique().tolist() == [value]
            assert copied.small.dtype == torch.bfloat16
            copied(torch.ones(1, 3)).sum().backward()
    totals = made.take_gradients(workers, 2)
    assert totals[[p is net.first.weight for p in made.parameters].index(True)] is not None


def test_copy_whose_memory_was_taken_from_it_follows_the_master_again() -> None:
    net = Net()
    made = replicas(net, own_memory=True)
    with made.step(2) as (_, copied):
        weight = copied.first.weight
    set_data(weight, weight.detach().clone())  # as cuDNN does, to have weights side by side
    with torch.no_grad():
        net.first.weight.fill_(5.0)
    with made.step(2) as (_, copied):
        assert copied.first.weight.unique().tolist() == [5.0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.parametrize("own_memory", [False, True])
def test_recurrent_layers_have_the_weights_they_have_a_list_of(own_memory: bool) -> None:
    net = Recurrent()
    flat = net.lstm._flat_weights
    made = replicas(net, own_memory=own_memory)
    for _ in range(2):
        with made.step(2) as modules:
            for index, module in enumerate(modules):
                # Else it moves them to other memory, on an accelerator.
                assert not module.lstm._weights_have_changed()
                listed = {id(weight) for weight in module.lstm._flat_weights}
                assert listed <= {id(leaf) for leaf in made.leaves_of(index)}
                module.lstm.flatten_parameters()
        assert net.lstm._flat_weights is flat
        assert "flatten_parameters" not in vars(net.lstm)
        assert not net.lstm._weights_have_changed()
    net.double()  # makes the list anew
    with made.step(2) as modules:
        assert not any(module.lstm._weights_have_changed() for module in modules)
        assert modules[1](torch.ones(1, 1, 3, dtype=torch.float64)) is not None


@pytest.mark.parametrize("own_memory", [False, True])
def test_parametrised_weights_of_recurrent_layers_are_computed_anew(own_memory: bool) -> None:
    net = Recurrent()
    nn.utils.parametrizations.weight_norm(net.lstm, "weight_hh_l0")
    made = replicas(net, own_memory=own_memory)
    x = torch.ones(3, 1, 3)
    for scale in (1.0, 2.0, 3.0):
        with torch.no_grad():
            net.lstm.parametrizations.weight_hh_l0.original0.fill_(scale)
            expected = net(x)
            with made.step(2) as modules:
                outputs = [module(x) for module in modules]
        for output in outputs:
            torch.testing.assert_close(output, expected)


def test_freezing_and_swapped_storage_reach_the_copy() -> None:
    net = Net()
    made = replicas(net)
    with made.step(2):
        pass
    net.first.requires_grad_(False)
    net.second.weight.data = torch.zeros(2, 3)
    with made.step(2) as (_, copied):
        assert not copied.first.weight.requires_grad
        assert not copied.second.weight.any()


def test_modules_added_or_replaced_reach_the_copy() -> None:
    net = Net()
    made = replicas(net)
    with made.step(2):
        pass
    net.first = nn.Linear(3, 3)
    net.more = nn.Linear(1, 1)
    with made.step(2) as (_, copied):
        assert copied.first.weight.data_ptr() == net.first.weight.data_ptr()
        assert copied.more is not net.more


def test_attributes_modes_and_buffers_reach_the_copy() -> None:
    net = Net()
    made = replicas(net)
    with made.step(2) as (_, copied):
        copied.scalar = 5
        copied.scale.add_(10)
    net.eval()
    net.scalar, net.added = 2, "new"
    del net.data
    with made.step(2) as (_, copied):
        assert not copied.training
        assert (copied.scalar, copied.added, copied.scale.item()) == (2, "new", 2)
        assert not hasattr(copied, "data")
    net.scale = torch.tensor(7.0)
    net.register_buffer("late", torch.ones(1))
    with made.step(2) as (_, copied):
        assert (copied.scale.item(), copied.late.item()) == (7, 1)
        assert copied.scale is not net.scale


class Filling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list: list[Any] = [0]
        self.groups: defaultdict[str, list[Any]] = defaultdict(list)
        self.last: deque[Any] = deque([0], maxlen=3)
        self.set = {0}
        self.dict = {"old": 0}
        self.alias = self.list
        self.big = list(range(MAX_CONTAINER + 1))

    def forward(self, value: Any) -> None:
        self.list.append(value)
        self.groups["a"].append(value)
        self.last.append(value)
        self.set.add(value)
        self.dict[f"new {value}"] = value
        self.dict["old"] += 1
        assert self.alias is self.list


def test_what_steps_put_into_containers_comes_back_in_order() -> None:
    net = Filling()
    made = replicas(net)
    before = net.list
    for step in (1, 2):
        with made.step(2) as modules:
            for index in (1, 0):
                modules[index](10 * step + index)
            assert modules[1].big is net.big
    assert net.list is before
    assert net.list == [0, 10, 11, 20, 21]
    assert net.groups == {"a": [10, 11, 20, 21]}
    assert list(net.last) == [11, 20, 21]
    assert net.set == {0, 10, 11, 20, 21}
    assert net.dict == {"old": 2, "new 10": 10, "new 11": 11, "new 20": 20, "new 21": 21}


def test_what_a_failed_step_put_into_copies_is_dropped() -> None:
    net = Filling()
    made = replicas(net)

    def fail() -> None:
        with made.step(2) as (_, copied):
            copied(5)
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fail()
    assert net.list == [0]
    with made.step(2) as (_, copied):
        assert copied.list == [0]


def test_units_are_replaced_everywhere_and_left_alone() -> None:
    class Unit:
        pass

    net = Net()
    unit = net.unit = Unit()
    net.units = {"again": unit}
    made = replicas(net, is_unit=lambda v: isinstance(v, Unit), copy_unit=lambda _: Unit())
    with made.step(2) as (master, copied):
        assert made.units == [unit]
        for slot, module in enumerate((master, copied)):
            assert module.unit is module.units["again"] is made.units_of(slot)[0]
            assert module.unit is not unit
    assert net.unit is net.units["again"] is unit


def test_opaque_objects_are_shared() -> None:
    class Opaque:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

    net = Net()
    net.opaque = Opaque(net.first)
    assert copy_of(net, is_opaque=lambda v: isinstance(v, Opaque)).opaque is net.opaque


def test_replicas_made_in_inference_mode_can_be_trained(workers: Workers) -> None:
    net = Net()
    made = replicas(net)
    with torch.inference_mode(), made.step(2) as modules:
        for module in modules:
            module(torch.ones(1, 3))
    with made.step(2) as modules:
        for module in modules:
            module(torch.ones(1, 3)).sum().backward()
    assert all(total is not None for total in made.take_gradients(workers, 2))


# Batch normalisation


def _statistics(layer: Any) -> list[Tensor]:
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_the_whole_batch(momentum: float | None) -> None:
    torch.manual_seed(0)
    layer, expected = (nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(2))
    made = replicas(layer)
    for _ in range(3):
        x = torch.randn(5, 3, 2, 2, dtype=torch.float64) * 3 + 1
        expected(x)
        with made.step(2) as modules:
            for module, part in zip(modules, x.split([3, 2]), strict=True):
                module(part)
    torch.testing.assert_close(_statistics(layer), _statistics(expected), rtol=0, atol=1e-12)


def test_running_statistics_of_a_layer_called_twice() -> None:
    torch.manual_seed(0)
    layer, expected = (nn.BatchNorm1d(3).double() for _ in range(2))
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)
    for each in (x, y):
        expected(each)
    with replicas(layer).step(2) as modules:
        for module, *parts in zip(modules, x.chunk(2), y.chunk(2), strict=True):
            for part in parts:
                module(part)
    torch.testing.assert_close(_statistics(layer), _statistics(expected), rtol=0, atol=1e-12)


def test_layers_in_eval_mode_use_and_keep_their_statistics() -> None:
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(5)  # type: ignore[union-attr]
    layer.eval()
    x = torch.randn(4, 3)
    expected = layer(x)
    with replicas(layer).step(2) as modules:
        parts = [module(part) for module, part in zip(modules, x.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(parts), expected)
    assert layer.running_mean.tolist() == [5, 5, 5]  # type: ignore[union-attr]


def test_statistics_of_a_failed_step_are_dropped() -> None:
    layer = nn.BatchNorm1d(3)
    before = [value.clone() for value in _statistics(layer)]
    made = replicas(layer)

    def fail() -> None:
        with made.step(2) as modules:
            modules[1](torch.randn(4, 3))
            modules[0](torch.randn(1, 3))

    with pytest.raises(ValueError, match="Expected more than 1 value"):
        fail()
    torch.testing.assert_close(_statistics(layer), before)
    assert (layer.momentum, dict(layer._forward_hooks)) == (0.1, {})
