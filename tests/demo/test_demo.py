"""The default task: its models, its data, and that the one learns the other."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_mgpu.demo.classifier import Classifier
from lightning_mgpu.demo.data import CIFAR10, Digits, Synthetic
from lightning_mgpu.demo.data.digits import read_digits
from lightning_mgpu.demo.lenet import LeNet
from lightning_mgpu.demo.mlp import MLP
from lightning_mgpu.demo.resnet import ResNet
from lightning_mgpu.demo.transformer import Transformer

MODELS = [LeNet, MLP, ResNet, Transformer]
IMAGE_SHAPES = [(1, 8, 8), (3, 32, 32), (2, 10, 13)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For networks this small a second thread costs time, on a busy machine a lot of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(**kwargs: Any) -> Transformer:
    return Transformer(vocab_size=11, sequence_length=6, **kwargs)


def samples(dataset: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*dataset, strict=True)
    return torch.stack(inputs), torch.stack(labels)


def quiet_trainer(**kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# Networks


@pytest.mark.parametrize("image_shape", IMAGE_SHAPES)
@pytest.mark.parametrize("model_class", MODELS)
def test_model_forward_shape(
    model_class: Callable[..., Classifier], image_shape: tuple[int, ...]
) -> None:
    model = model_class(image_shape=image_shape, num_classes=7)
    logits = model(torch.rand(3, *image_shape))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32


def test_transformer_tokens_forward_shape() -> None:
    model = tokens(num_classes=5).eval()
    assert model(torch.randint(11, (3, 6))).shape == (3, 5)
    assert model(torch.randint(11, (3, 4))).shape == (3, 5), "shorter than sequence_length"


@pytest.mark.parametrize("model_class", [*MODELS, tokens])
def test_model_every_parameter_gets_a_gradient(model_class: Callable[..., Classifier]) -> None:
    model = model_class()
    inputs = torch.randint(11, (4, 6)) if model_class is tokens else torch.rand(4, 1, 8, 8)
    F.cross_entropy(model(inputs), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model_class", [*MODELS, tokens])
def test_model_net_can_be_traced(model_class: Callable[..., Classifier]) -> None:
    net = model_class().eval().net
    traced = fx.symbolic_trace(net)
    for size in (2, 5):
        inputs = (
            torch.randint(11, (size, 6)) if model_class is tokens else torch.rand(size, 1, 8, 8)
        )
        assert torch.equal(traced(inputs), net(inputs))


def test_transformer_trace_can_be_cut_between_layers() -> None:
    traced = fx.symbolic_trace(Transformer(layers=3).net)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [t for t in called if t.startswith("layers")] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("model_class", MODELS)
def test_model_is_one_child(model_class: Callable[..., Classifier]) -> None:
    assert [name for name, _ in model_class().named_children()] == ["net"]


def test_lenet_hidden_sizes() -> None:
    net = LeNet(l1=17, l2=5).net
    assert (net.fc1.out_features, net.fc2.in_features, net.fc2.out_features) == (17, 17, 5)


def test_mlp_without_hidden_layer_is_linear() -> None:
    assert len(list(MLP(hidden=()).parameters())) == 2


def test_resnet_blocks_and_widths() -> None:
    net = ResNet(width=4, blocks=(1, 2)).net
    assert [len(net.group1), len(net.group2)] == [1, 2]
    assert net.head.in_features == 8
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


def test_model_hyperparameters_are_plain() -> None:
    config = OmegaConf.create({"image_shape": [3, 8, 8], "channels": [4, 8], "lr": 0.5})
    model = LeNet(**config)  # Hydra hands lists over as OmegaConf's own
    assert type(model.hparams["image_shape"]) is tuple
    assert type(model.hparams["channels"]) is tuple
    assert model.hparams["lr"] == model.lr == 0.5
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("model_class", [*MODELS, tokens])
def test_model_comes_back_from_a_checkpoint(
    model_class: Callable[..., Classifier], tmp_path: Path
) -> None:
    model = model_class(num_classes=4)
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert restored.hparams == model.hparams
    assert all(
        torch.equal(value, restored.state_dict()[key]) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize("image_shape", [(8, 8), (1, 8, 0)])
@pytest.mark.parametrize("model_class", MODELS)
def test_model_refuses_image_shape(
    model_class: Callable[..., Classifier], image_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"`image_shape` must be three positive sizes .* got \("):
        model_class(image_shape=image_shape)


def test_lenet_refuses_images_too_small_to_pool() -> None:
    with pytest.raises(ValueError, match="at least 4x4, got 8x3"):
        LeNet(image_shape=(1, 8, 3))


def test_lenet_refuses_channels_that_are_no_pair() -> None:
    with pytest.raises(ValueError, match=r"`channels` must be a pair.*\(6,\)"):
        LeNet(channels=(6,))


def test_transformer_refuses_dim_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of `heads` \(dim: 10, heads: 4\)"):
        Transformer(dim=10, heads=4)


def test_transformer_refuses_vocabulary_without_length() -> None:
    with pytest.raises(ValueError, match=r"`vocab_size` \(11\) needs a `sequence_length`"):
        Transformer(vocab_size=11)


# Steps


def test_classifier_logs_metrics() -> None:
    trainer, model = quiet_trainer(max_epochs=1), MLP()
    data = Synthetic(size=100, image_shape=(1, 8, 8), batch_size=16)
    trainer.fit(model, datamodule=data)
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss", "val_acc"}
    trainer.test(model, datamodule=data, verbose=False)
    assert set(trainer.callback_metrics) == {"test_loss", "test_acc"}


def test_classifier_metrics_are_over_samples_not_batches() -> None:
    # 10 test samples in batches of 8 and 2: a mean of the batches' means would be off.
    model = MLP(image_shape=(1, 8, 8)).eval()
    data = Synthetic(size=100, image_shape=(1, 8, 8), batch_size=8)
    metrics = quiet_trainer().test(model, datamodule=data, verbose=False)[0]
    inputs, labels = samples(data.splits.test)
    with torch.no_grad():
        logits = model(inputs)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    assert metrics["test_acc"] == pytest.approx(accuracy.item())
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_classifier_predicts_probabilities_in_order() -> None:
    model, data = MLP(image_shape=(1, 8, 8)), Synthetic(size=100, image_shape=(1, 8, 8))
    predictions = torch.cat(quiet_trainer().predict(model, datamodule=data))
    with torch.no_grad():
        expected = torch.softmax(model(samples(data.splits.test)[0]), dim=1)
    assert torch.allclose(predictions, expected)
    assert torch.allclose(predictions.sum(dim=1), torch.ones(10))


def test_classifier_predicts_without_labels() -> None:
    assert MLP().predict_step(torch.rand(3, 1, 8, 8), 0).shape == (3, 10)


# Digits


def test_digits_are_the_ones_of_scikit_learn() -> None:
    with patch.dict(os.environ):  # it sets variables when it is first imported
        datasets = pytest.importorskip("sklearn.datasets")
    originals = datasets.load_digits()
    images, labels = read_digits().tensors
    expected = torch.as_tensor(originals.images, dtype=torch.float32).unsqueeze(1) / 16
    assert torch.equal(images, expected)
    assert torch.equal(labels, torch.as_tensor(originals.target, dtype=torch.int64))


def test_digits_are_the_ones_of_the_original_file() -> None:
    images, labels = read_digits().tensors
    rows = torch.cat([images.flatten(1) * 16, labels.unsqueeze(1)], dim=1)
    lines = "".join(",".join(map(str, row)) + "\n" for row in rows.int().tolist())
    digest = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_digits_samples() -> None:
    data = Digits()
    images, labels = samples(data.splits.train)
    assert torch.equal(images, read_digits().tensors[0][data.splits.train.indices])
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))


def test_digits_splits_share_nothing_and_cover_all() -> None:
    parts = [split.indices for split in Digits().splits]
    assert [len(part) for part in parts] == [1259, 179, 359]
    assert sorted(index for part in parts for index in part) == list(range(1797))


def test_digits_split_is_the_same_under_any_seed() -> None:
    torch.manual_seed(1)
    one = Digits()
    one.setup("fit")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = Digits()
    other.setup("test")
    assert one.splits.test.indices == other.splits.test.indices
    assert torch.equal(state, torch.get_rng_state()), "setup must not draw from the run's numbers"


def test_digits_split_seed_deals_anew() -> None:
    assert Digits().splits.test.indices != Digits(split_seed=1).splits.test.indices


def test_digits_loads_once() -> None:
    data = Digits()
    data.setup("fit")
    before = data.splits
    data.setup("test")
    assert data.splits is before


def test_digits_fractions() -> None:
    splits = Digits(val_fraction=0.5, test_fraction=0.25).splits
    assert [len(split) for split in splits] == [450, 898, 449]


@pytest.mark.parametrize(("val", "test"), [(0.75, 0.25), (-0.1, 0.2), (0.2, -0.1)])
def test_data_refuses_fractions(val: float, test: float) -> None:
    data = Synthetic(size=20, val_fraction=val, test_fraction=test)
    with pytest.raises(ValueError, match=f"20 samples .*val_fraction: {val}.*fraction: {test}"):
        data.setup()


# Loaders


def test_loaders_shuffle_training_only() -> None:
    data = Synthetic(size=100, image_shape=(1, 2, 2), batch_size=100)
    torch.manual_seed(0)
    first, second = (next(iter(data.train_dataloader()))[0] for _ in range(2))
    assert not torch.equal(first, second)
    for loader, split in (
        (data.val_dataloader(), data.splits.val),
        (data.test_dataloader(), data.splits.test),
        (data.predict_dataloader(), data.splits.test),
    ):
        assert torch.equal(next(iter(loader))[0], samples(split)[0])


def test_loaders_keep_every_sample() -> None:
    data = Synthetic(size=100, val_fraction=0, test_fraction=0, batch_size=32)
    assert [len(labels) for _, labels in data.train_dataloader()] == [32, 32, 32, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_keep_their_processes_if_any(num_workers: int) -> None:
    loader = Synthetic(size=100, num_workers=num_workers).train_dataloader()
    assert loader.num_workers == num_workers
    assert loader.persistent_workers is (num_workers > 0)


# CIFAR-10


def fake_torchvision(calls: list[tuple[bool, bool]]) -> ModuleType:
    """Stand in for torchvision: 60 images in place of 60000, and a list of what was opened."""
    package = ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", loader=None)

    class FakeCIFAR10(TensorDataset):
        def __init__(self, root: Path, *, train: bool, download: bool, transform: Any) -> None:
            calls.append((train, download))
            assert transform == "to tensor"
            size = 50 if train else 10
            super().__init__(torch.rand(size, 3, 32, 32), torch.arange(size) % 10)
            self.root = root

    class Namespace:
        CIFAR10 = FakeCIFAR10

        @staticmethod
        def ToTensor() -> str:
            return "to tensor"

    package.datasets = package.transforms = Namespace  # type: ignore[attr-defined]
    return package


def test_cifar10_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    monkeypatch.setitem(sys.modules, "torchvision", fake_torchvision(calls))
    data = CIFAR10(data_dir="~/somewhere", val_fraction=0.2, batch_size=5)
    data.prepare_data()
    assert calls == [(True, True), (False, True)]
    data.setup("fit")
    assert calls[2:] == [(True, False), (False, False)], "only prepare_data downloads"
    assert [len(split) for split in data.splits] == [40, 10, 10]
    assert set(data.splits.train.indices).isdisjoint(data.splits.val.indices)
    assert data.splits.test.root == Path.home() / "somewhere"
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.dtype) == ((5, 3, 32, 32), torch.int64)


def test_cifar10_downloads_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    monkeypatch.setitem(sys.modules, "torchvision", fake_torchvision(calls))
    CIFAR10(download=False).prepare_data()
    assert calls == []


def test_cifar10_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="needs torchvision: pip install torchvision"):
        CIFAR10()


# Synthetic


def test_synthetic_images() -> None:
    data = Synthetic(size=50, num_classes=3, image_shape=(2, 5, 4), val_fraction=0, test_fraction=0)
    images, labels = samples(data.splits.train)
    assert (images.shape, images.dtype) == ((50, 2, 5, 4), torch.float32)
    assert (labels.dtype, labels.unique().tolist()) == (torch.int64, [0, 1, 2])


def test_synthetic_tokens() -> None:
    data = Synthetic(size=200, vocab_size=9, sequence_length=12, val_fraction=0, test_fraction=0)
    sequences, labels = samples(data.splits.train)
    assert (sequences.shape, sequences.dtype) == ((200, 12), torch.int64)
    assert (sequences.min(), sequences.max()) == (0, 8)
    assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("vocab_size", [None, 20])
def test_synthetic_repeats_with_its_seed(vocab_size: int | None) -> None:
    def batch(seed: int) -> Tensor:
        data = Synthetic(size=60, image_shape=(1, 4, 4), vocab_size=vocab_size, seed=seed)
        return samples(data.splits.test)[0]

    torch.manual_seed(1)
    first = batch(seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, batch(seed=3))
    assert not torch.equal(first, batch(seed=4))


def test_synthetic_without_validation_and_test() -> None:
    data = Synthetic(size=64, image_shape=(1, 8, 8), val_fraction=0, test_fraction=0)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(MLP(), datamodule=data)
    assert trainer.global_step == 1


def test_synthetic_refuses_image_shape() -> None:
    with pytest.raises(ValueError, match="`image_shape` must be three"):
        Synthetic(image_shape=(8, 8))


# Learning


@pytest.mark.parametrize(
    ("model", "data", "epochs", "wanted"),
    [
        (LeNet, Digits, 6, 0.93),
        (ResNet, Digits, 2, 0.9),
        (
            lambda: MLP(num_classes=4),
            lambda: Synthetic(size=500, num_classes=4, image_shape=(1, 8, 8)),
            3,
            0.95,
        ),
        (
            lambda: Transformer(num_classes=4, vocab_size=50, sequence_length=16, layers=1),
            lambda: Synthetic(size=1000, num_classes=4, vocab_size=50, sequence_length=16),
            3,
            0.85,
        ),
    ],
    ids=["lenet-digits", "resnet-digits", "mlp-images", "transformer-tokens"],
)
def test_model_learns(
    model: Callable[[], Classifier],
    data: Callable[[], LightningDataModule],
    epochs: int,
    wanted: float,
) -> None:
    torch.manual_seed(0)
    trainer, module, datamodule = quiet_trainer(max_epochs=epochs), model(), data()
    trainer.fit(module, datamodule=datamodule)
    assert trainer.test(module, datamodule=datamodule, verbose=False)[0]["test_acc"] >= wanted
