"""Which arguments of the split module carry the batch, and along which dimension."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pipelines import Net, assert_same, data, pipelined
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.inputs.splitter import Splitter
from lightning_mgpu.engine.pipeline.microbatch import SplitError


class Encoder(nn.Module):
    """Attention along the first dimension: tensors of shape (time, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1)
            self.second = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1)
        self.double().eval()

    def forward(self, src: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(src, src_key_padding_mask=mask), src_key_padding_mask=mask)


class Conditioned(Net):
    """A second input, of the batch's length or of one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.t = nn.Linear(1, 8).double()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x) + self.t(t)))


@pytest.mark.parametrize("time", [3, 8, 12])
def test_a_transposed_view_of_the_batch_is_split_along_its_second_dimension(time: int) -> None:
    x = data(8, time, 6)
    assert_same(Encoder(), x.transpose(0, 1), batch=[x, torch.zeros(8)])


def test_a_transposed_view_beside_a_mask_with_an_entry_per_sample() -> None:
    x, mask = data(8, 5, 6), torch.zeros(8, 5, dtype=torch.bool)
    mask[3:, 4] = True
    assert_same(Encoder(), x.transpose(0, 1), mask, batch={"x": x, "mask": mask})


@pytest.mark.parametrize("time", [3, 8, 12, 16])
def test_a_named_dimension_is_split(time: int) -> None:
    x = data(8, time, 6)
    for dim in (1, -2):
        named: Any = {"src": dim}
        assert_same(Encoder(), x.transpose(0, 1).contiguous(), batch=[x], split_args=named)
    assert_same(Encoder(), x.transpose(0, 1) + 0, batch=[x], split_args={0: 1})


@pytest.mark.parametrize("time", [3, 12])
def test_a_computed_tensor_is_split_along_the_only_dimension_that_can_be_the_batch(
    time: int,
) -> None:
    x = data(8, time, 6)
    assert_same(Encoder(), x.transpose(0, 1) + 0, batch=[x, torch.zeros(8)])


@pytest.mark.parametrize(
    ("time", "mode"), [(3, "off"), (12, "off"), (16, "off"), (16, "error"), (16, "warn")]
)
def test_time_is_not_cut_for_the_batch(time: int, mode: str) -> None:
    x = data(8, time, 6)
    message = "split_args={'src': 1}"
    with (
        pipelined(Encoder(), [x, torch.zeros(8)], parity_check=mode) as run,
        pytest.raises(SplitError) as raised,
    ):
        run(x.transpose(0, 1) + 0)
    assert message in str(raised.value)


def test_time_that_is_as_long_as_the_batch_is_not_cut() -> None:
    x = data(8, 8, 6)
    with (
        pipelined(Encoder(), [x, torch.zeros(8)]) as run,
        pytest.raises(SplitError, match="depends on other samples"),
    ):
        run(x.transpose(0, 1) + 0)


def test_time_first_batches_are_refused_by_name() -> None:
    x = data(12, 8, 6)
    with (
        pipelined(Encoder(), {"x": x, "y": torch.zeros(8)}) as run,
        pytest.raises(SplitError, match="`src` of shape"),
    ):
        run(x)


def test_rows_that_are_samples_of_their_own_need_no_name() -> None:
    x = data(8, 6)
    assert_same(Net(), torch.cat([x, x + 1]), batch=[x])  # two views
    assert_same(Net(), x[x[:, 0] > 0], batch=[x])  # some of them
    crops = data(8, 4, 6)
    assert_same(Net(), crops.flatten(0, 1), batch=[crops, torch.zeros(8)])
    noise = data(20, 6)
    assert_same(Net(), noise, batch=[x])


def test_batches_of_two_sizes_are_split_each_by_its_own() -> None:
    labelled, unlabelled = data(8, 6), data(24, 6)
    batch = {"labelled": [labelled, torch.zeros(8)], "unlabelled": unlabelled}
    assert_same(Net(), labelled, batch=batch)
    assert_same(Net(), unlabelled, batch=batch)


def test_graphs_are_refused() -> None:
    class Graph(Net):
        def forward(self, x: Tensor, edges: Tensor) -> Any:
            h = self.first(x)
            return self.second(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))

    x, edges = data(10, 6), torch.randint(10, (2, 30), generator=torch.Generator().manual_seed(0))
    for mode in ("error", "off"):
        with (
            pipelined(Graph(), {"x": x, "edges": edges}, parity_check=mode) as run,
            pytest.raises(SplitError, match=r"`edges` of shape \(2, 30\).*broadcast_args"),
        ):
            run(x, edges)


def test_one_entry_for_all_samples_is_broadcast_and_forgotten() -> None:
    x, t = data(8, 6), data(8, 1, seed=2)
    module = Conditioned()
    for options in ({}, {"split_args": ["x", "t"]}):
        with pipelined(module, [x, t], **options) as run:
            for given in (t[:1], t, t[:1], t):
                torch.testing.assert_close(run(x, given), module(x, given), rtol=0, atol=1e-9)


def test_what_was_whole_before_is_shown_to_be_or_refused() -> None:
    x, t = data(8, 6), data(8, 1, seed=2)

    class Summed(Conditioned):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return self.second(torch.tanh(self.first(x) + self.t(t).sum(0)))

    with pipelined(Summed()) as run:
        for length in (5, 8):  # all of it for every sample
            expected = run.cutter.forward(x, t[:length])
            torch.testing.assert_close(run(x, t[:length]), expected, rtol=0, atol=1e-9)
    with pipelined(Conditioned()) as run:
        run(x[:5], t[:1])
        with pytest.raises(RuntimeError):
            run(x, t[:5])
        with pytest.raises((SplitError, RuntimeError), match="`t`"):
            run(x, t + 0)


class Held:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Holder(Net):
    def forward(self, x: Tensor, more: Any) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (torch.eye(8).to_sparse(), "`more` is a sparse_coo tensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "`more` is a nested tensor"),
        (Held(torch.ones(8, 2)), "`more` is a `Held`, which holds tensors"),
        (torch.distributions.Normal(torch.zeros(8), torch.ones(8)), "is a `Normal`, which holds"),
        (nn.utils.rnn.pack_sequence([torch.ones(2)] * 8), "`more` is a `PackedSequence`.*lengths"),
        ([1.0] * 8, "the list `more` has the batch's length"),
    ],
    ids=["sparse", "nested", "object", "distribution", "packed", "list"],
)
def test_what_cannot_be_split_is_refused_with_the_way_out(more: Any, message: str) -> None:
    with pipelined(Holder()) as run, pytest.raises(SplitError, match=message):
        run(data(8, 6), more)


def test_what_is_named_goes_whole_whatever_it_is() -> None:
    for more in (torch.eye(8).to_sparse(), Held(torch.ones(8, 2)), [1.0] * 8):
        assert_same(Holder(), data(8, 6), more, broadcast_args="more")


def test_transformations_of_functions_are_refused() -> None:
    x = data(3, 8, 6)
    with pipelined(Net()) as run, pytest.raises(SplitError, match=r"torch\.func"):
        torch.func.vmap(run)(x)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize("split_at", ["0.1", "1"])
def test_a_first_layer_may_write_to_the_batch(checkpoint: Any, split_at: str) -> None:
    """The caller's tensor is changed, as on one device."""
    x = data(8, 6)
    alone, split = x.clone(), x.clone()
    layers = [nn.Hardtanh(-0.5, 0.7, inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True)]
    module = nn.Sequential(nn.Sequential(*layers), nn.Linear(6, 3)).double()
    expected = torch.autograd.grad(module(alone).square().mean(), list(module.parameters()))
    with pipelined(module, [split], split_at=split_at, checkpoint=checkpoint) as run:
        before = split._version
        loss = run(split).square().mean()
        assert split._version > before
        found = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(split, alone, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_writing_to_what_the_caller_differentiates_is_refused(checkpoint: Any) -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    x = data(8, 6).requires_grad_() * 1
    with (
        pipelined(module, split_at="2", checkpoint=checkpoint) as run,
        pytest.raises(RuntimeError, match=r"modifies its argument `.*` in place"),
    ):
        run(x)


def test_options_take_names_positions_and_dimensions() -> None:
    def forward(src: Any, mask: Any) -> None: ...

    config = OmegaConf.create({"mapping": {"src": 1}, "names": ["src"]})
    for given in ("src", 0, ["src"], {"src": 1}, {0: -1}, None, (), *config.values()):
        Splitter(given, "mask").check(forward)
    with pytest.raises(ValueError, match="give the number of the batch's dimension"):
        Splitter({"src": "batch"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="both name"):
        Splitter({"src": 1}, ["src"])
    with (
        pipelined(Net(), split_args={"x": 2}) as run,
        pytest.raises(SplitError, match="has no dimension 2"),
    ):
        run(data(8, 6))


def test_gradients_of_arguments_that_are_split_along_another_dimension() -> None:
    module, x = Encoder(), data(8, 5, 6).requires_grad_()
    (expected,) = torch.autograd.grad(module(x.transpose(0, 1)).square().sum(), x)
    with pipelined(module, [x]) as run:
        (found,) = torch.autograd.grad(run(x.transpose(0, 1)).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
