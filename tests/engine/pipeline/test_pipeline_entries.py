"""Lists with an entry per sample, as arguments of a pipelined module and as its output."""

from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
from pipelines import Net, assert_same, data, pipelined
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mgpu import PipelineStrategy
from lightning_mgpu.engine.pipeline.microbatch import SplitError

WORDS = [
    "a",
    "few words",
    "",
    "and some more",
    "b",
    "one",
    "two",
    "three",
    "x",
    "yz",
    "4",
    "5",
    "6",
]


class Averages(Net):
    """Images of different heights."""

    def forward(self, images: list[Tensor]) -> Any:
        return self.second(self.first(torch.stack([image.mean(0) for image in images])))


class Letters(Net):
    """Texts, beside what each of them weighs."""

    def forward(self, texts: Any, x: Tensor) -> Any:
        return _weighed(self, texts, x)


class Nested(Net):
    def forward(self, batch: dict[str, Any]) -> Any:
        return _weighed(self, batch["texts"], batch["x"])


def _weighed(net: Net, texts: Any, x: Tensor) -> Any:
    lengths = torch.tensor([float(len(text)) for text in texts], dtype=torch.float64)
    return net.second(net.first(x) * lengths.unsqueeze(1))


def _images(count: int) -> list[Tensor]:
    return [data(2 + index % 3, 6, seed=index) for index in range(count)]


@pytest.mark.parametrize("samples", [8, 13])
def test_tensors_of_different_lengths_are_dealt_out(samples: int) -> None:
    images = _images(samples)
    assert_same(Averages(), images, batch=(images, torch.zeros(samples)))
    assert_same(Averages(), tuple(images), batch=(tuple(images), torch.zeros(samples)))
    assert_same(Averages(), images, batch=(images, torch.zeros(samples)), chunks=1)


@pytest.mark.parametrize("samples", [8, 13])
@pytest.mark.parametrize("parity_check", ["error", "off"])
def test_texts_of_the_batch_are_dealt_out(samples: int, parity_check: str) -> None:
    texts, x = WORDS[:samples], data(samples, 6)
    assert_same(Letters(), texts, x, parity_check=parity_check)
    batch = {"texts": texts, "x": x}
    assert_same(Nested(), batch, batch=batch, parity_check=parity_check)


def test_a_list_made_in_the_step_is_dealt_out_once_that_is_shown_to_be_right() -> None:
    texts, x = WORDS[:8], data(8, 6)
    assert_same(Letters(), list(texts), x, batch=[texts, x])
    with pytest.raises(SplitError, match=r"Ambiguous: the list `texts` has the batch's length 8\."):
        assert_same(Letters(), ["abc"] * 8, x, batch=x)
    with pytest.raises(SplitError, match=r"the list `texts` has the batch's length"):
        assert_same(Letters(), list(texts), x, batch=[texts, x], parity_check="off")
    named = {"split_args": ["texts", "x"], "parity_check": "off"}
    assert_same(Letters(), list(texts), x, batch=[texts, x], **named)


class Layers(Net):
    """A list with a number for each layer, of which there are as many as samples."""

    def forward(self, x: Tensor, widths: list[float]) -> Any:
        return self.second(self.first(x) * sum(widths))


def test_a_list_that_is_as_long_as_the_batch_by_chance_is_never_dealt_out_in_silence() -> None:
    x, widths = data(8, 6), [float(index) for index in range(8)]
    with pytest.raises(SplitError, match="`widths`"):
        assert_same(Layers(), x, widths, batch=x)
    assert_same(Layers(), x, widths, batch=x, broadcast_args="widths")


def test_a_list_of_another_number_of_samples_is_refused() -> None:
    with (
        pipelined(Letters(), data(8, 6), split_args="texts") as run,
        pytest.raises(SplitError, match="`texts` is a `list` of 7 samples, but the batch has 8"),
    ):
        run(WORDS[:7], data(8, 6))


def test_entries_that_want_a_gradient_are_refused() -> None:
    images = [image.requires_grad_() for image in _images(8)]
    with (
        pipelined(Averages(), (images, torch.zeros(8))) as run,
        pytest.raises(SplitError, match=r"`images` is a `list` with an entry per sample.*gradient"),
    ):
        run(images)
    with torch.no_grad():
        assert_same_without_gradient(Averages(), images)


def assert_same_without_gradient(module: nn.Module, images: list[Tensor]) -> None:
    expected = module(images)
    with pipelined(module, (images, torch.zeros(8))) as run:
        torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-9)


class Counts(Net):
    """Leaves something with each sample."""

    def forward(self, samples: list[dict[str, Any]]) -> Any:
        for sample in samples:
            sample["seen"] = sample.get("seen", 0) + 1
        return self.second(self.first(torch.stack([sample["x"] for sample in samples])))


def test_what_is_left_with_samples_is_left_once() -> None:
    samples = [{"x": data(6, seed=index)} for index in range(8)]
    with pipelined(Counts(), (samples, torch.zeros(8))) as run:
        run(samples)
        assert [sample["seen"] for sample in samples] == [1] * 8
        run(samples)
        assert [sample["seen"] for sample in samples] == [2] * 8


ENDS = {
    "rows": lambda z: list(z.unbind()),
    "a tuple of rows": lambda z: tuple(z.unbind()),
    "texts": lambda z: {"z": z, "texts": [f"{v:.3f}" for v in z[:, 0]]},
    "boxes": lambda z: [{"boxes": row.repeat(1 + (row[0] > 0).int(), 1)} for row in z],
    "beside others": lambda z: {"loss": z.mean(), "found": [(row, float(row[0])) for row in z]},
}


@pytest.mark.parametrize("samples", [8, 13])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_entries_of_the_output_come_in_order(end: Any, samples: int) -> None:
    module, x = Net(end=end), data(samples, 6)
    output, expected = assert_same(module, x), module(x)
    assert type(output) is type(expected)
    if isinstance(output, dict) and "texts" in output:
        assert output["texts"] == expected["texts"]
    with torch.no_grad(), pipelined(module, x) as run:
        alone = run(x)
    assert len(alone) == len(expected)


def test_entries_that_depend_on_other_samples_are_refused() -> None:
    module = Net(end=lambda z: list((z - z.mean(0)).unbind()))
    with (
        pipelined(module, data(8, 6)) as run,
        pytest.raises(SplitError, match=r"different values for micro-batches.*`output\[0\]`"),
    ):
        run(data(8, 6))


def test_an_output_list_of_columns_stays_one() -> None:
    for samples in (8, 9):
        output = assert_same(Net(end=lambda z: [z, z.square()]), data(samples, 6))
        assert [tuple(column.shape) for column in output] == [(samples, 4)] * 2
    # As many columns as a micro-batch has samples.
    output = assert_same(Net(end=lambda z: [z, z.square()]), data(8, 6), chunks=4)
    assert len(output) == 2


def test_lists_of_no_fixed_length_are_refused() -> None:
    module = Net(end=lambda z: [row for row in z for _ in range(2)])
    with (
        pipelined(module, data(8, 6)) as run,
        pytest.raises(SplitError, match="`output`: the module returns a different structure"),
    ):
        run(data(8, 6))


class Replaces(Averages):
    def forward(self, images: list[Tensor]) -> Any:
        for index, image in enumerate(images):
            images[index] = image.mul(2)
        return super().forward(images)


def test_writing_to_the_list_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    images = _images(8)
    with pipelined(Replaces(), (images, torch.zeros(8))) as run:
        run(images)
        run(images)
    assert caplog.text.count("`Replaces.forward` writes to `images`, of which each") == 1


class Pads(Net):
    """Texts of numbers, padded to the longest beside them, and a mean that counts the padding."""

    def forward(self, rows: list[Tensor]) -> Any:
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.second(self.first(padded).mean(1))


def _rows(lengths: list[int]) -> list[Tensor]:
    return [data(length, 6, seed=index) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [[2, 3, 2, 2, 2, 2, 2, 2], [2] * 7 + [3]])
@pytest.mark.parametrize("chunks", [4, 8])
def test_padding_to_the_largest_of_a_part_is_found_wherever_samples_differ(
    lengths: list[int], chunks: int
) -> None:
    rows = _rows(lengths)
    with (
        pipelined(Pads(), (rows, torch.zeros(8)), chunks=chunks) as run,
        pytest.raises(
            SplitError, match="different values for micro-batches than for the whole batch"
        ),
    ):
        run(rows)


def test_micro_batches_that_are_padded_alike_pass() -> None:
    """If each has a long one."""
    rows = _rows([2, 3] * 4)
    assert_same(Pads(), rows, batch=(rows, torch.zeros(8)))
    with (
        pipelined(Pads(), (rows, torch.zeros(8)), chunks=8) as run,
        pytest.raises(
            SplitError, match="different values for micro-batches than for the whole batch"
        ),
    ):
        run(rows)


def test_padding_is_found_in_the_first_batch_that_needs_it() -> None:
    even, uneven = _rows([2] * 8), _rows([2] * 6 + [3, 2])
    module, batch = Pads(), [even, torch.zeros(8)]
    with pipelined(module, batch) as run:
        torch.testing.assert_close(run(even), module(even), rtol=0, atol=1e-9)
        batch[0] = uneven
        with pytest.raises(SplitError, match="different values for micro-batches"):
            run(uneven)


class Uncollated(pl.LightningModule):
    """Gets batches as the data set's samples, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Counts()

    def training_step(self, batch: list[dict[str, Any]], index: int) -> Tensor:
        loss = self.net(batch) - torch.stack([sample["y"] for sample in batch])
        return loss.square().mean()

    def predict_step(self, batch: list[dict[str, Any]], index: int) -> Any:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_batches_that_are_lists_of_samples_train_as_on_one_device() -> None:
    """Each sample has six numbers, which is no batch of six: the DataLoader tells."""

    def loader() -> DataLoader[Any]:
        samples: Any = [
            {"x": data(6, seed=index), "y": data(4, seed=-index)} for index in range(26)
        ]
        return DataLoader(samples, batch_size=8, collate_fn=list)

    alone, staged = Uncollated(), Uncollated()
    boring.trainer("auto", 1, max_epochs=2).fit(alone, loader())
    trainer = boring.trainer(PipelineStrategy(split_at=["net.second"]), 2, max_epochs=2)
    trainer.fit(staged, loader())
    boring.assert_same_weights(staged, alone)
    for found, expected in zip(
        trainer.predict(staged, loader()) or [],
        boring.trainer("auto", 1).predict(alone, loader()) or [],
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


class Either(pl.LightningModule):
    """Gets lists with a tensor for each sample, or what torch's collation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Means()

    def predict_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch)


class Means(Net):
    """Of rows of the same length, each sample's a list of two or two in tensors side by side."""

    def forward(self, batch: Any) -> Any:
        is_samples = isinstance(batch, tuple)
        pair = [torch.stack(side) for side in zip(*batch, strict=True)] if is_samples else batch
        return self.second(self.first((pair[0] + 2 * pair[1]) / 3))


def test_each_loader_has_batches_of_its_own_kind_and_each_call_anew() -> None:
    def samples(count: int) -> Any:
        return [[data(6, seed=i), data(6, seed=-i)] for i in range(1, count + 1)]

    def listed() -> DataLoader[Any]:
        return DataLoader(samples(8), batch_size=4, collate_fn=tuple)

    def collated() -> DataLoader[Any]:
        return DataLoader(samples(8), batch_size=4)

    model = Either()
    whole = model.net(next(iter(DataLoader(samples(8), batch_size=8))))
    trainer = boring.trainer(PipelineStrategy(split_at=["net.second"], chunks=2), 2)
    for loaders in ([listed(), collated()], [collated(), listed()], [listed()], [collated()]):
        found = trainer.predict(model, loaders)
        assert found is not None
        for of_loader in found if len(loaders) > 1 else [found]:
            torch.testing.assert_close(torch.cat(of_loader), whole, rtol=0, atol=1e-9)


class Mixes(Net):
    """Takes the batch as it is: inputs, others to mix them with, and how much."""

    def forward(self, batch: list[Any]) -> Any:
        x, other, weight = batch
        return super().forward(x * weight + other * (1 - weight))


@pytest.mark.parametrize("samples", [8, 3])
def test_a_batch_with_as_many_parts_as_samples_stays_one(samples: int) -> None:
    batch = [data(samples, 6), data(samples, 6, seed=2), torch.tensor(0.25, dtype=torch.float64)]
    assert_same(Mixes(), batch, batch=batch)


def test_what_is_named_needs_no_proof_within_a_dict_either() -> None:
    texts, x = list(WORDS[:8]), data(8, 6)
    with pipelined(Nested(), [x], split_args="batch", parity_check="off") as run:
        found = run({"texts": texts, "x": x})
    torch.testing.assert_close(found, Nested()({"texts": texts, "x": x}), rtol=0, atol=1e-9)
