"""What is used of torch beside its documentation: autograd, dispatch, generators, groups."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_mgpu._compat import torch as compat


def test_version_counts_writes() -> None:
    tensor = torch.zeros(2)
    before = compat.version_of(tensor)
    tensor.add_(1)
    tensor[0] = 3
    assert compat.version_of(tensor) == before + 2


def test_views_tell_their_base() -> None:
    tensor = torch.zeros(4)
    assert compat.is_view(tensor[:2])
    assert compat.base_of(tensor[:2]) is tensor
    assert not compat.is_view(tensor)
    assert compat.base_of(tensor) is None


def test_node_at_hand_is_that_of_the_backward_pass() -> None:
    seen: list[Any] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(compat.node_at_hand())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(compat.node_at_hand())
            return gradient

    output = Noted.apply(torch.ones(2, requires_grad=True))
    node = output.grad_fn
    output.sum().backward()
    assert seen == [None, node]
    assert node.name() == "NotedBackward"


def test_version_is_kept() -> None:
    tensor, other = torch.zeros(2), torch.ones(2)
    with compat.version_kept(tensor), torch.no_grad():
        tensor.set_(other.untyped_storage(), 0, other.shape, other.stride())
    assert compat.version_of(tensor) == 0
    assert tensor.data_ptr() == other.data_ptr()


def test_hooks_of_what_is_saved_are_seen() -> None:
    assert not compat.saves_are_hooked()
    with torch.autograd.graph.save_on_cpu():
        assert compat.saves_are_hooked()
    assert not compat.saves_are_hooked()


def test_modes_see_the_products_within_attention() -> None:
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    attention = torch.nn.MultiheadAttention(4, 2)
    x = torch.rand(3, 1, 4)
    own = attention.out_proj
    given = (x, x, x, 4, 2, attention.in_proj_weight, attention.in_proj_bias)
    rest = (None, None, False, 0.0, own.weight, own.bias)
    expected = torch.nn.functional.multi_head_attention_forward(*given, *rest)[0]
    with Seeing():
        found = compat.attention_with_modes(*given, *rest)[0]
    assert seen.count(torch.nn.functional.linear) == 2
    assert torch.equal(found, expected)
    with Seeing():
        attention(x, x, x)
    assert torch.nn.functional.multi_head_attention_forward in seen, (
        "what the whole call is known by"
    )


def test_nodes_are_numbered_in_the_order_they_are_made() -> None:
    tensor = torch.ones(2, requires_grad=True)
    number = compat.next_node_number()
    made = tensor * 2
    assert compat.node_number(made.grad_fn) == number
    assert compat.next_node_number() == number + 1
    again = made * 2
    assert compat.node_number(again.grad_fn) == number + 1


@pytest.mark.parametrize("keeps", [True, False])
def test_backward_tells_whether_it_keeps_the_graph(keeps: bool) -> None:
    seen = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            seen.append(compat.backward_keeps_graph())
            return gradients

    Asking.apply(torch.ones(1, requires_grad=True)).backward(retain_graph=keeps)
    assert seen == [keeps]


class _Watch(compat.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_fused_optimizers_unscale_gradients_themselves() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    fused = torch.optim.Adam(parameters, fused=True)
    assert compat.scales_gradients(fused)
    assert not compat.scales_gradients(torch.optim.Adam(parameters))


def test_copy_to_each_copies_pair_by_pair() -> None:
    into = [torch.zeros(2), torch.zeros((), dtype=torch.int64)]
    compat.copy_to_each(into, [torch.tensor([1.0, float("nan")]), torch.tensor(3)])
    assert into[0][0] == 1
    assert into[0][1].isnan()
    assert into[1] == 3


def test_add_to_each_adds_pair_by_pair_in_one_operation() -> None:
    into, others = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.ones(1)]
    with _Watch() as watch:
        compat.add_to_each(into, others)
    assert [tensor.tolist() for tensor in into] == [[1.0, 1.0], [2.0]]
    assert [func.overloadpacket for func in watch.seen] == [compat.ATEN_ADD_TO_EACH]


def test_to_is_a_copy_for_a_dispatch_mode() -> None:
    with _Watch() as watch:
        torch.zeros(1).to(torch.float64)
    assert compat.ATEN_COPY in [func.overloadpacket for func in watch.seen]


def test_schema_tells_arguments_and_writes() -> None:
    with _Watch() as watch:
        torch.nn.functional.dropout(torch.ones(2), 0.5).add_(1)
    mutable = {func.overloadpacket: compat.schema_of(func).is_mutable for func in watch.seen}
    assert mutable[torch.ops.aten.add_] is True
    assert mutable[torch.ops.aten.mul] is False
    arguments = compat.schema_of(torch.ops.aten.bernoulli_.float).arguments
    assert [argument.name for argument in arguments] == ["self", "p", "generator"]
    assert arguments[1].default_value == 0.5


def test_dispatch_modes_are_listed_from_the_outermost() -> None:
    assert compat.dispatch_modes() == []
    with _Watch() as outer, _Watch() as inner:
        found = compat.dispatch_modes()
    assert [mode is one for mode, one in zip(found, (outer, inner), strict=True)] == [True, True]


def test_dispatch_modes_are_asked_about_compiled_code() -> None:
    assert compat.TorchDispatchMode.ignore_compile_internals() is False
    assert callable(torch.ops.aten.dropout.default.decompose)


def test_innermost_function_mode_is_the_one_entered_last() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert compat.innermost_function_mode() is None
    with Mode() as outer:
        with Mode() as inner:
            assert compat.innermost_function_mode() is inner
        assert compat.innermost_function_mode() is outer


def test_functorch_wraps_tensors() -> None:
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(compat.is_functorch_wrapped(x))
        return x * x

    torch.vmap(square)(torch.ones(2))
    assert seen == [True]
    assert not compat.is_functorch_wrapped(torch.ones(2))


class _Recording:
    """A generator that is asked for its state."""

    def __init__(self, real: torch.Generator) -> None:
        self._real = real
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self._real, name)


@contextmanager
def _recording() -> Iterator[_Recording]:
    recording = _Recording(torch.default_generator)
    compat.put_host_generator(recording)
    try:
        yield recording
    finally:
        compat.put_host_generator(torch.default_generator)


def test_host_generator_is_the_one_that_torch_asks() -> None:
    with _recording() as recording:
        state = torch.get_rng_state()
        torch.set_rng_state(state)
        assert recording.asked == ["get_state", "set_state"]
    assert torch.equal(torch.get_rng_state(), state)
    assert recording.asked == ["get_state", "set_state"]


def test_host_generator_is_the_one_that_checkpoints_save() -> None:
    with _recording() as recording:
        output = checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False)
        saved = recording.asked.count("get_state")
        assert saved
        output.backward()
        assert "set_state" in recording.asked


def test_device_generators_are_those_that_the_module_asks() -> None:
    """As far as this shows without a device: its functions look the name up in their module."""
    for function in (torch.cuda.get_rng_state, torch.cuda.set_rng_state, torch.cuda.manual_seed):
        names = _names_in(function.__code__)
        assert "default_generators" in names
    before = compat.device_generators(torch.cuda)
    assert isinstance(before, tuple)
    recordings = (_Recording(torch.default_generator),)
    compat.put_device_generators(torch.cuda, recordings)
    try:
        assert compat.device_generators(torch.cuda) == recordings
    finally:
        compat.put_device_generators(torch.cuda, before)


def _names_in(code: Any) -> set[str]:
    inner = (part for part in code.co_consts if hasattr(part, "co_names"))
    return {*code.co_names, *(name for part in inner for name in _names_in(part))}


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The store of a process group, of one process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # it will be set
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    if dist.is_initialized():
        dist.destroy_process_group()
    compat.forget_failed_group()


def test_groups_are_named_by_a_count_that_can_begin_anew(group: dist.Store) -> None:
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.group_name == "0"
    dist.new_group([0])
    compat.forget_failed_group()
    with pytest.raises(ValueError, match="group name has already been created"):
        dist.new_group([0])


def test_abort_takes_the_default_group() -> None:
    import inspect

    from torch.distributed.distributed_c10d import _abort_process_group

    (parameter,) = inspect.signature(_abort_process_group).parameters.values()
    assert parameter.default is None


def test_wrappers_are_named_as_torch_names_them() -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    theirs = {
        _common_utils.FSDP_WRAPPED_MODULE,
        checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE,
    }
    assert theirs == compat.WRAPPERS


def test_schedulers_tell_their_rates_and_parts() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    first = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    both = torch.optim.lr_scheduler.ChainedScheduler([first])
    assert list(compat.inner_schedulers(both)) == [first]
    assert compat.inner_schedulers(first) == ()
    assert compat.learning_rates(first) == [[0.5], [0.5]]
    for rates in compat.learning_rates(first):
        rates[0] = 0.25
    assert (first.base_lrs, first.get_last_lr()) == ([0.25], [0.25])
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, first], [1])
    assert compat.inner_schedulers(sequence) == [first, first]


def test_tree_leaves_are_the_values_of_containers() -> None:
    assert compat.tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]
