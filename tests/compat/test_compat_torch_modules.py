"""What is used of `torch.nn.Module` and its layers beside their documentation."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu._compat import torch_modules as compat


def test_parts_are_the_modules_own() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    layer = module[0]
    assert set(compat.parameters_of(layer)) == {"weight", "bias"}
    assert set(compat.buffers_of(layer)) == {"running_mean", "running_var", "num_batches_tracked"}
    assert compat.children_of(module) == {"0": layer}
    assert compat.parameters_of(module) == {}
    parts = (compat.PARAMETERS, compat.BUFFERS, compat.CHILDREN)
    assert [vars(layer)[name] for name in parts] == [
        compat.parameters_of(layer),
        compat.buffers_of(layer),
        compat.children_of(layer),
    ]


def test_parts_that_are_put_in_are_those_of_the_module() -> None:
    layer = nn.Linear(1, 1, bias=False)
    compat.parameters_of(layer)["weight"] = nn.Parameter(torch.full((1, 1), 3.0))
    compat.buffers_of(layer)["extra"] = torch.ones(1)
    assert layer(torch.ones(1)) == 3
    assert layer.extra == 1


def test_buffers_that_are_not_saved_are_listed() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(1), persistent=False)
    assert vars(module)[compat.BUFFERS_NOT_SAVED] == {"a"}


def test_blank_modules_have_parts_and_hooks() -> None:
    assert compat.HOOKS | {compat.PARAMETERS, compat.BUFFERS, compat.CHILDREN} <= compat.BLANK
    assert "weight" not in compat.BLANK


def test_map_tensors_replaces_parameters_and_buffers() -> None:
    layer = nn.BatchNorm1d(2)
    compat.map_tensors(layer, lambda tensor: tensor.double())
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.SyncBatchNorm(1)])
def test_batch_norm_is_the_class_of_layers_that_normalise(layer: nn.Module) -> None:
    assert isinstance(layer, compat.BatchNorm)


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()])
def test_dropout_is_the_class_of_layers_that_drop_out(layer: nn.Module) -> None:
    assert isinstance(layer, compat.Dropout)
    assert not isinstance(layer, compat.BatchNorm)


@pytest.fixture
def calls() -> list[Any]:
    return []


def _noting(calls: list[Any], name: str) -> Callable[..., None]:
    return lambda module, *rest: calls.append((name, len(rest)))


def test_attached_hooks_are_called_until_they_are_detached(calls: list[Any]) -> None:
    layer = nn.Identity()
    compat.attach(layer, "ours", _noting(calls, "before"), _noting(calls, "after"))
    layer(torch.ones(1))
    assert calls == [("before", 1), ("after", 2)]
    compat.detach(layer, "ours")
    compat.detach(layer, "ours")
    layer(torch.ones(1))
    assert len(calls) == 2
    assert not any(compat.forward_hook_tables(layer))


def test_hooks_around_come_first_with_keywords_and_after_an_error(calls: list[Any]) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, fails: bool = False) -> Tensor:
            calls.append("forward")
            if fails:
                raise ValueError("of the test")
            return x

    module = Failing()
    module.register_forward_pre_hook(_noting(calls, "theirs"))
    compat.attach_around(module, "ours", _noting(calls, "before"), _noting(calls, "after"))
    module(torch.ones(1))
    assert calls == [("before", 2), ("theirs", 1), "forward", ("after", 2)]
    calls.clear()
    with pytest.raises(ValueError, match="of the test"):
        module(torch.ones(1), fails=True)
    assert calls[-1] == ("after", 2)
    compat.detach(module, "ours")
    calls.clear()
    module(torch.ones(1))
    assert calls == [("theirs", 1), "forward"]


def test_a_hook_around_may_change_arguments_and_output() -> None:
    layer = nn.Identity()

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] * 2,), kwargs

    compat.attach_around(layer, "ours", before, lambda module, args, output: output + 1)
    assert layer(torch.ones(1)) == 3


def test_all_hooks_are_listed() -> None:
    layer = nn.Identity()
    hooks = [lambda *_: None for _ in range(4)]
    layer.register_forward_hook(hooks[0])
    layer.register_forward_hook(hooks[1], with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(hooks[2])
    layer.register_forward_pre_hook(hooks[3], with_kwargs=True)
    assert compat.forward_hooks_of(layer) == hooks
    assert all(compat.forward_hook_tables(layer))
    tables = [id(table) for table in compat.forward_hook_tables(layer)]
    assert set(tables) <= {id(vars(layer)[name]) for name in compat.HOOKS}


def test_a_module_compiled_in_place_calls_what_is_put_in(calls: list[Any]) -> None:
    module = nn.Identity()
    assert compat.compiled_call(module) is None
    assert not compat.is_compiled_anyhow(module)
    module.compile(backend="eager")
    assert compat.compiled_call(module) is not None
    assert compat.is_compiled_anyhow(module)
    assert not compat.is_compiled(module)

    def ours(x: Tensor) -> Tensor:
        calls.append(x)
        return x

    compat.set_compiled_call(module, ours)
    module(torch.ones(1))
    assert len(calls) == 1
    compat.set_compiled_call(module, None)
    assert not compat.is_compiled_anyhow(module)


def test_a_compiled_module_tells_its_original() -> None:
    inner = nn.Linear(1, 1)
    made = torch.compile(inner, backend="eager")
    assert isinstance(made, nn.Module)
    assert compat.is_compiled(made)
    assert compat.is_compiled_anyhow(made)
    assert compat.original_of(made) is inner
    assert not compat.is_compiled(inner)


def test_a_copy_of_a_compiled_module_calls_the_copy() -> None:
    inner = nn.Linear(1, 1, bias=False)
    made: Any = torch.compile(inner, backend="eager")
    copied = copy.copy(made)
    vars(copied).update(vars(made))
    other = nn.Linear(1, 1, bias=False)
    compat.compile_again(made, copied, other)
    assert set(vars(copied)) >= compat.COMPILED_ATTRIBUTES
    x = torch.ones(1)
    assert torch.equal(copied(x), other(x))
    assert torch.equal(made(x), inner(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_compute_with_their_list_of_weights(kind: type[nn.RNNBase]) -> None:
    layer = kind(1, 1)
    assert compat.has_weights(layer)
    found = compat.weights_of(layer)
    assert found.names[:2] == ["weight_ih_l0", "weight_hh_l0"]
    assert all(one is getattr(layer, n) for n, one in zip(found.names, found.weights, strict=True))
    assert [reference() for reference in found.references] == found.weights
    leaves = [nn.Parameter(torch.full_like(weight, 0.25)) for weight in found.weights]
    compat.parameters_of(layer).update(zip(found.names, leaves, strict=True))
    # Another list of the same, so that a new one shows.
    vars(layer)[compat.WEIGHTS] = ours = list(leaves)
    vars(layer)[compat.WEIGHT_REFERENCES] = [weakref.ref(leaf) for leaf in leaves]
    output, _ = layer(torch.ones(1, 1, 1))
    output.sum().backward()
    assert vars(layer)[compat.WEIGHTS] is ours
    assert all(leaf.grad is not None for leaf in leaves)


def test_recurrent_layers_make_a_new_list_of_other_weights() -> None:
    layer = nn.GRU(1, 1)
    before = vars(layer)[compat.WEIGHTS]
    compat.parameters_of(layer)["weight_ih_l0"] = nn.Parameter(torch.zeros(3, 1))
    layer(torch.ones(1, 1, 1))
    assert vars(layer)[compat.WEIGHTS] is not before


def test_weights_that_are_gone_are_an_error() -> None:
    layer = nn.LSTM(1, 1)
    del vars(layer)[compat.WEIGHTS]
    with pytest.raises(AttributeError, match=r"torch .* lists of weights of a `LSTM`"):
        compat.weights_of(layer)


def test_what_ddp_ignores_is_told_before_it_is_built() -> None:
    module = nn.Linear(2, 2)
    assert compat.ignored_by_ddp(module) == set()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, ["bias"]
    )
    assert compat.ignored_by_ddp(module) == {"bias"}
