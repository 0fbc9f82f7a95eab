"""Cutting modules, and telling which arguments carry the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.inputs.call_arguments import CallArguments
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.microbatch import SplitError
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.cutter import Cut, Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks


class Net(nn.Module):
    """Any `forward` between two layers."""

    def __init__(self, middle: Callable[..., Any] = lambda self, x: x) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.middle = middle

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        x = self.middle(self, self.first(x))
        if mask is not None:
            x = x + mask
        return self.second(x)


def _observed(module: nn.Module, stages: int = 2, **options: Any) -> Cut:
    cutter = Cutter(module, module.forward, stages, **options)
    with torch.no_grad():
        return cutter.observe(lambda: module(torch.ones(8, 4)), 4)


def _cut(module: nn.Module, stages: int = 2, **options: Any) -> list[tuple[str, ...]]:
    return list(_observed(module, stages, **options).layers)


def test_names_and_modules_keep_their_identity() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    before = dict(module.named_parameters())
    cut = _observed(module, split_at=["1.1"])
    assert cut.units == {
        "0": (module[0], 0),
        "1.0": (module[1][0], 0),
        "1.1": (module[1][1], 1),
    }
    assert [list(tensors) for tensors in cut.tensors] == [
        ["0.weight", "0.bias"],
        ["1.1.weight", "1.1.bias"],
    ]
    assert cut.tensors[0]["0.weight"] is before["0.weight"]


def test_modules_without_a_cut_are_kept_whole() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    assert _cut(module, split_at=["1"]) == [("0",), ("1", "2")]
    assert _cut(module, split_at=["1.1"]) == [("0", "1.0"), ("1.1", "2")]


def test_balance_counts_layers() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    assert _cut(module, balanced=[5, 1]) == [("0", "1", "2.0"), ("2.1",)]


def test_balance_by_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 200), nn.Linear(200, 4))
    assert _cut(module) == [("0", "1", "2"), ("3",)]


def test_layers_are_opened_as_far_as_balance_needs() -> None:
    """A backbone with nearly all parameters, and a head."""
    backbone = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4)))
    module = nn.Sequential(backbone, nn.Linear(4, 1))
    assert _cut(module) == [("0.0", "0.1"), ("0.2", "0.3", "1")]
    even = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4)))
    assert _cut(even) == [("0", "1"), ("2", "3")]


def test_order_is_that_of_the_calls() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    module = Reversed()
    assert _cut(module) == [("layers.3", "layers.2"), ("layers.1", "layers.0")]
    expected = Cutter(module, module.forward, 2).expected()
    assert expected is not None
    assert list(expected.layers) == [("layers.0", "layers.1"), ("layers.2", "layers.3")]


def test_a_layer_that_comes_back_belongs_to_its_first_stage() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module.append(module[0])
    cut = _observed(module)
    assert list(cut.layers) == [("0",), ("1",)]
    assert cut.way == (0, 1, 0)


def test_what_is_never_called_lies_with_what_stands_before_it() -> None:
    module = Net()
    module.rest = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cut = _observed(module)
    assert list(cut.layers) == [("first",), ("second",)]
    assert cut.units["rest"] == (module.rest, 1)
    assert "rest.1.weight" in cut.tensors[1]


def test_layers_of_a_wrapper_are_found() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    assert _cut(Wrapper()) == [("net.first",), ("net.second",)]


def test_torchs_own_modules_are_kept_whole() -> None:
    layer = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    module.append(nn.Flatten())

    def run() -> Tensor:
        return module(torch.ones(2, 3, 4))

    cutter = Cutter(module, module.forward, 2)
    assert [len(layers) for layers in cutter.observe(run, 4).layers] == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_at": ["third"]}, "has no submodule `third`.*children are `first`, `second`"),
        ({"split_at": ["first"]}, "Nothing is computed before `first`"),
        ({"split_at": ["second", "first"], "stages": 3}, "`first` is called before `second`"),
        ({"split_at": ["first", "second"]}, r"`split_at` makes 3 stages, but there are 2 devices"),
        (
            {"balanced": [1, 2]},
            r"`balance=\[1, 2\]` is for 3 layers, but `Net` has 2: first",
        ),
        ({"balanced": [2]}, "`balance` makes 1 stages, but there are 2 devices"),
        ({"stages": 3}, r"has 2 layers.*too few for 3 stages"),
    ],
)
def test_impossible_cuts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        _cut(Net(), **options)


def test_unreachable_split_point_is_refused() -> None:
    module = Net()
    module.never = nn.Linear(4, 4)
    with pytest.raises(PartitionError, match="`never` is never called"):
        _cut(module, split_at=["never"])


def test_factories_are_called_each_time() -> None:
    module = Net(lambda self, x: x + torch.rand(4))
    run = _pipeline(module)
    x = torch.ones(8, 4)
    first, second = run(x), run(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[4]), "each micro-batch draws its own"


def test_whatever_changes_from_call_to_call_is_heeded() -> None:
    class Switch(Net):
        factor = 1.0

        def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
            x = self.first(x) * (2 if double else 1) * self.factor
            if self.training:
                x = x + 1
            return self.second(x if mask is None else x * mask)

    module = Switch().double()
    run = _pipeline(module, broadcast_args=["mask"])
    x, mask = torch.randn(8, 4).double(), torch.randn(4).double()
    for training in (True, False, True):
        module.train(training)
        for kwargs in ({}, {"mask": mask}, {"double": True}, {"mask": mask, "double": True}):
            torch.testing.assert_close(run(x, **kwargs), module.forward(x, **kwargs))
    module.factor = 3.0
    torch.testing.assert_close(run(x), module.forward(x))
    module.second = nn.Linear(4, 4).double()
    torch.testing.assert_close(run(x), module.forward(x))


def test_objects_that_cannot_be_compared_are_told_apart() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scales: set[float]) -> Tensor:  # type: ignore[override]
            return self.second(self.first(x) * max(scales))

    module = Scaled()
    run, x = _pipeline(module), torch.ones(8, 4)
    for number in range(5):  # each set may lie where the one before it lay
        torch.testing.assert_close(run(x, {float(number)}), module.forward(x, {float(number)}))


def test_hooks_run_for_each_chunk_on_whole_modules_and_on_those_that_are_cut() -> None:
    module, seen = Net(), []
    net = nn.Sequential(module, nn.Linear(4, 4))
    for hooked in (module, module.first):
        hooked.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    run = _pipeline(net)
    run(torch.ones(8, 4))
    seen.clear()  # without the trial that finds out what is called
    run(torch.ones(8, 4))
    assert seen == [2] * 8


# Which arguments carry the batch.


def _split(batch: Any, *args: Any, model: Any = (), **options: Any) -> tuple[int, set[str]]:
    kwargs = options.pop("kwargs", {})

    def forward(x: Any = None, mask: Any = None, *more: Any, key: Any = None) -> None: ...

    splitter, known = Splitter(**options), StepBatch(batch)
    call = CallArguments.of(forward, args, kwargs, splitter.pieces(forward, (args, kwargs), known))
    splitting = splitter.split(call, forward, known, lambda: model)
    return splitting.size, set(splitting.dims)


X, MASK = torch.randn(6, 3), torch.randn(6, 6)


def test_the_only_tensor_is_split() -> None:
    assert _split([], X) == (6, {"x"})
    assert _split([], X + 0, 3, None) == (6, {"x"})


def test_tensors_of_another_length_go_everywhere() -> None:
    assert _split([], X, torch.ones(5, 5)) == (6, {"x"})
    assert _split([], X, torch.tensor(1.0)) == (6, {"x"})


def test_tensors_of_the_batch_are_split() -> None:
    y = torch.ones(6)
    assert _split([X, y], X, y[:]) == (6, {"x", "mask"})
    assert _split([X, y], kwargs={"key": {"a": [X], "b": y}}) == (6, {"key['a'][0]", "key['b']"})


@pytest.mark.parametrize("batch", [[], [X], [X, MASK]])
def test_a_mask_as_long_as_the_batch_is_not_cut_by_accident(batch: list[Tensor]) -> None:
    with pytest.raises(
        SplitError, match=r"Ambiguous: .*`mask` of shape \(6, 6\), as long as the batch \(6\)"
    ):
        _split(batch, X, MASK)


def test_a_mask_before_the_batch_is_not_taken_for_it() -> None:
    with pytest.raises(SplitError, match="Name `x` in `split_args`"):
        _split([X], MASK, X)


def test_named_arguments_settle_it() -> None:
    assert _split([], X, MASK, broadcast_args=["mask"]) == (6, {"x"})
    assert _split([], X, MASK, broadcast_args=[1]) == (6, {"x"})
    assert _split([], X, MASK, split_args=["x", "mask"]) == (6, {"x", "mask"})
    assert _split([], X, X + 1, MASK, split_args=[0, 1], broadcast_args=["more"])[1] == {
        "x",
        "mask",
    }


def test_buffers_of_the_model_go_everywhere() -> None:
    assert _split([], X, MASK, model=[MASK]) == (6, {"x"})
    assert _split([], X, MASK[:, :3], model=[MASK]) == (6, {"x"})


def test_what_once_was_of_another_length_is_known() -> None:
    def forward(x: Any, mask: Any) -> None: ...

    splitter = Splitter()
    for length in (8, 6):
        args = torch.ones(length, 3), MASK
        call = CallArguments.of(forward, args, {}, splitter.pieces(forward, args, StepBatch()))
        splitting = splitter.split(call, forward, StepBatch(), list)
        assert (splitting.size, splitting.dims) == (length, {"x": 0})


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((1.5,), {}, "none of the arguments is a tensor"),
        ((X, torch.ones(5)), {"split_args": ["x", "mask"]}, "named in `split_args`, but the batch"),
    ],
)
def test_what_cannot_be_split_is_refused(
    args: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SplitError, match=message):
        _split([], *args, **options)


def test_lists_as_long_as_the_batch_are_split_and_doubted_unless_they_are_its_own() -> None:
    def forward(x: Any, names: Any) -> None: ...

    names, splitter = ["a", "b", "c", "d", "e", "f"], Splitter()
    for batch, is_doubted in ((None, True), (X, True), ((X, names), False)):
        known = StepBatch(batch)
        pieces = splitter.pieces(forward, (X, names), known)
        call = CallArguments.of(forward, (X, names), {}, pieces)
        splitting = splitter.split(call, forward, known, list)
        assert splitting.pieces == ("names",)
        assert (
            any("the list `names` has the batch's length" in text for text in splitting.doubts)
            == is_doubted
        )


def test_packed_sequences_are_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2)])
    with pytest.raises(SplitError, match="`x` is a `PackedSequence`"):
        _split([], packed)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="`split_args` has 'y', but `forward` takes x"):
        Splitter(split_args=["y"]).check(lambda x: x)
    with pytest.raises(ValueError, match="both name"):
        Splitter(split_args=["y"], broadcast_args=["y"])


@pytest.fixture(autouse=True)
def _closed() -> Any:
    yield
    while _PIPELINES:
        _PIPELINES.pop().close()


_PIPELINES: list[Pipeline] = []


def _pipeline(module: nn.Module, **options: Any) -> Pipeline:
    devices = [torch.device("cpu")] * 2
    cutter = Cutter(module, module.forward, 2)
    _PIPELINES.append(Pipeline(cutter, Splitter(**options), devices, chunks=Chunks(2, 4)))
    return _PIPELINES[-1]
