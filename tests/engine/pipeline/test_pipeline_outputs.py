"""Where the batch lies in what the split module returns."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pipelines import Net, assert_same, data, pipelined
from torch import Tensor, nn

from lightning_mgpu.engine.pipeline.microbatch import SplitError


class States(nn.Module):
    """A recurrent layer's sequence and states: the batch is the first dimension, and the second."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 4), nn.LSTM(4, 5, 2, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


@dataclass
class Found:
    logits: Tensor
    extra: dict[str, Any]


@pytest.mark.parametrize("chunks", [2, 3, 4, 8, 16])
def test_states_of_recurrent_layers_are_joined_along_their_second_dimension(chunks: int) -> None:
    output, (h, _) = assert_same(States(), data(16, 3, 6), chunks=chunks)
    assert output.shape == (16, 3, 5)
    assert h.shape == (2, 16, 5)


@pytest.mark.parametrize("chunks", [2, 4, 8])
@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize(
    "end",
    [
        lambda z: z.transpose(0, 1),
        lambda z: z.flatten(0, 1),
        lambda z: z.transpose(0, 1).flatten(0, 1),
        lambda z: torch.cat([z, -z]),
        lambda z: torch.stack([z, 2 * z]),
        lambda z: z.unsqueeze(0),
        lambda z: Found(z, {"flat": z.flatten(), "last": (z[:, -1], None)}),
        lambda z: torch.fft.rfft(z),
        lambda z: {"z": z, "table": torch.eye(8, dtype=z.dtype)},
        lambda z: (z, torch.tensor(2.0)),
    ],
    ids=[
        *("time first", "flat", "flat by time", "two views", "stacked", "unsqueezed"),
        *("dataclass", "complex", "table", "constant"),
    ],
)
def test_outputs_are_those_of_one_device(end: Any, chunks: int, checkpoint: Any) -> None:
    assert_same(Net(end=end), data(8, 3, 6), chunks=chunks, checkpoint=checkpoint)


def test_a_table_of_parameters_is_returned_once_with_its_gradient() -> None:
    class Prototypes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(data(8, 4, seed=3))

        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)
            return z @ self.table.T, self.table * 2, self.table.norm().exp()

    assert_same(Prototypes(), data(8, 6))


@pytest.mark.parametrize("samples", [8, 13, 16])
@pytest.mark.parametrize(
    "end",
    [
        lambda z: z.T @ z,
        lambda z: z @ z.T,
        lambda z: z.sum(0),
        lambda z: z.sum(0, keepdim=True),
        lambda z: torch.cdist(z, z),
        lambda z: torch.bincount(z.argmax(1), minlength=4),
        lambda z: {"logits": z, "gram": z.T @ z},
    ],
    ids=["gram", "pairs", "sum", "kept sum", "distances", "counts", "nested"],
)
def test_what_has_no_entry_per_sample_is_refused(end: Any, samples: int) -> None:
    with (
        pipelined(Net(end=end)) as run,
        pytest.raises(SplitError, match=r"`output(\['gram'\])?`.*[Rr]eturn"),
    ):
        run(data(samples, 6))


@pytest.mark.parametrize("samples", [8, 13])
def test_numbers_are_means_over_the_batch(samples: int) -> None:
    assert_same(Net(end=lambda z: {"loss": z.square().mean(), "logits": z}), data(samples, 6))


def test_means_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module = Net(end=lambda z: z.square().mean())
    with pipelined(module) as run:
        run(data(8, 6))
        module.eval()
        run(data(8, 6))
    assert caplog.text.count("averaged over samples") == 1


@pytest.mark.parametrize(
    "penalty", [lambda z: z.relu().sum(), lambda z: z.relu().mean()], ids=["sum", "mean"]
)
def test_a_number_that_is_zero_at_first_is_a_sum_or_a_mean_once_that_shows(penalty: Any) -> None:
    module = Net(lambda z: z, lambda z: {"z": z, "penalty": penalty(z.abs() - 10)})
    with pipelined(module) as run:
        for scale in (0.1, 100.0, 0.1, 200.0):
            x = scale * data(8, 6)
            found, expected = run(x), module(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
            gradients = [
                torch.autograd.grad(out["z"].sum() + out["penalty"], list(module.parameters()))
                for out in (found, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-9)
        assert float(found["penalty"]) > 1


def test_a_number_that_is_no_mean_is_refused_once_that_shows() -> None:
    def end(z: Tensor) -> Any:
        excess = (z.abs() - 10).relu()
        return {"z": z, "penalty": excess.sum() / (excess > 0).sum().clamp(min=1)}

    with pipelined(Net(lambda z: z, end)) as run:
        run(0.1 * data(8, 6))
        with pytest.raises(SplitError, match=r"different values for micro-batches.*penalty"):
            run(100 * data(8, 6))


def test_numbers_that_are_no_means_are_refused() -> None:
    module = Net(end=lambda z: z[:, 0].sum() / (z[:, 1] > 0).sum())
    with (
        pipelined(module) as run,
        pytest.raises(SplitError, match=r"different values for micro-batches.*: `output`"),
    ):
        run(data(8, 6))


def test_one_micro_batch_is_taken_as_it_is() -> None:
    assert_same(Net(end=lambda z: (z.T @ z, z.mean(), z)), data(8, 6), chunks=1)


def test_caches_are_refused_by_their_key() -> None:
    class Cache:
        pass

    def end(z: Tensor) -> Any:
        return {"logits": z, "past_key_values": Cache()}

    with (
        pipelined(Net(end=end)) as run,
        pytest.raises(SplitError, match=r"`output\['past_key_values'\]`.*`Cache`.*use_cache=False"),
    ):
        run(data(8, 6))


def test_arguments_handed_back_are_the_callers_own() -> None:
    class Vae(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    module, x = Vae(), data(8, 6).requires_grad_()
    with pipelined(module, [x]) as run:
        reconstruction, returned = run(x)
        assert returned is x
        (gradient,) = torch.autograd.grad((reconstruction.sum(1) * returned[:, 0]).sum(), x)
    (expected,) = torch.autograd.grad((module(x)[0].sum(1) * x[:, 0]).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_without_the_check_shapes_of_micro_batches_tell() -> None:
    options: Any = {"parity_check": "off"}
    assert_same(Net(end=lambda z: z.transpose(0, 1)), data(8, 3, 6), **options)
    assert_same(Net(end=lambda z: z.flatten(0, 1)), data(7, 3, 6), **options)
    with (
        pipelined(Net(end=lambda z: z.flatten(0, 1)), **options) as run,
        pytest.raises(SplitError, match="first dimension is not the batch"),
    ):
        run(data(8, 3, 6))


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_complex_values_between_stages_keep_their_gradient(checkpoint: Any) -> None:
    class Spectral(Net):
        def forward(self, x: Tensor) -> Any:
            z = self.middle(torch.fft.rfft(self.first(x)))
            return self.second(torch.fft.irfft(z * 0.5, n=8)), z

    module = Spectral(middle=lambda z: z * 2)
    assert_same(module, data(8, 6), split_at="middle", checkpoint=checkpoint)
    assert_same(module, data(8, 6), split_at="second", checkpoint=checkpoint)
