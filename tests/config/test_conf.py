"""The shipped configs: each composes, and names what exists."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONF, config
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from lightning_mgpu.callbacks import ExactResume, NonFiniteGuard, OutOfMemoryGuard

FILES = sorted(CONF.rglob("*.yaml"))
CHOICES = [(path.parent.relative_to(CONF).as_posix(), path.stem) for path in FILES]
CHOICES.remove((".", "config"))
DEFAULT_GROUPS = {
    str(group)
    for entry in OmegaConf.load(CONF / "config.yaml").defaults
    if isinstance(entry, DictConfig)
    for group in entry
}


def choices(group: str) -> list[str]:
    return [name for other, name in CHOICES if other == group]


def targets(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            yield from targets(node[key])


def override(group: str, name: str) -> str:
    return f"{group}={name}" if group in DEFAULT_GROUPS else f"+{group}={name}"


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=map("/".join, CHOICES))
def test_choice_composes_and_names_what_exists(group: str, name: str) -> None:
    cfg = config(override(group, name))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for node in targets(cfg):
        target = get_object(node._target_)
        assert callable(target)
        arguments = {str(key): None for key in node if not str(key).startswith("_")}
        if arguments:
            inspect.signature(target).bind_partial(**arguments)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_file_opens_with_what_it_is_for(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    # Hydra reads `# @package` on the first line only.
    comment = second if first.startswith("# @package") else first
    assert comment.startswith("# ")
    assert not comment.startswith("# @")


@pytest.mark.parametrize("name", choices("experiment"))
def test_experiment_opens_with_its_command(name: str) -> None:
    opening = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert opening.endswith(f": python -m lightning_mgpu experiment={name}")


def test_config_defaults() -> None:
    cfg = config()
    assert cfg.model._target_ == "lightning_mgpu.demo.lenet.LeNet"
    assert cfg.data._target_ == "lightning_mgpu.demo.data.Digits"
    assert (cfg.mode, cfg.ckpt_path, cfg.seed, cfg.metric) == ("fit", None, 42, "val_acc")
    assert "strategy" not in cfg, "so that `+strategy=ddp` can add one"


def test_config_leaves_directories_to_hydra() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", return_hydra_config=True).hydra
    node = OmegaConf.to_container(hydra, resolve=False)
    assert isinstance(node, dict)
    assert node["run"]["dir"].startswith("outputs/")
    assert node["sweep"]["dir"].startswith("multirun/")
    assert node["job"]["chdir"] is False
    assert node["help"]["app_name"] == "lightning_mgpu"


@pytest.mark.parametrize("name", ["lenet", "mlp", "resnet", "transformer"])
def test_model_config_holds_the_defaults_of_its_class(name: str) -> None:
    assert_class_defaults(config(f"model={name}").model)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_data_config_holds_the_defaults_of_its_class(name: str) -> None:
    assert_class_defaults(config(f"data={name}").data)


def test_plan_config_holds_the_defaults_of_its_class() -> None:
    assert_class_defaults(config("+plan=default").plan)


def assert_class_defaults(node: DictConfig) -> None:
    parameters = inspect.signature(get_object(node._target_)).parameters
    written = OmegaConf.to_container(node, resolve=True)
    assert isinstance(written, dict)
    del written["_target_"]
    defaults = {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in parameters.items()
    }
    assert written == defaults


@pytest.mark.parametrize("data", ["digits", "cifar10", "synthetic"])
@pytest.mark.parametrize("model", ["lenet", "mlp", "resnet", "transformer"])
def test_data_fits_the_model_to_itself(model: str, data: str) -> None:
    module = instantiate(config(f"model={model}", f"data={data}").model)
    assert isinstance(module, LightningModule)
    image_shape = (1, 8, 8) if data == "digits" else (3, 32, 32)
    assert module.hparams["image_shape"] == image_shape
    assert module(torch.rand(2, *image_shape)).shape == (2, 10)


def test_data_synthetic_passes_its_own_sizes_on() -> None:
    cfg = config("data=synthetic", "data.image_shape=[2,9,7]", "data.num_classes=3")
    assert list(cfg.model.image_shape) == [2, 9, 7]
    assert cfg.model.num_classes == 3


def test_data_synthetic_tokens_reach_the_transformer() -> None:
    cfg = config("data=synthetic", "model=transformer", "data.vocab_size=30", "data.size=100")
    inputs, _ = next(iter(instantiate(cfg.data).train_dataloader()))
    assert inputs.shape == (64, 32)
    assert instantiate(cfg.model)(inputs).shape == (64, 10)


def test_experiment_has_the_last_word_but_for_the_command_line() -> None:
    assert config("experiment=quick").trainer.max_epochs == 3
    assert config("experiment=quick", "trainer.max_epochs=1").trainer.max_epochs == 1
    assert config("experiment=quick", "model=resnet").model._target_.endswith("ResNet")


def test_strategy_auto_is_lightnings_word_for_it() -> None:
    assert instantiate(config("+strategy=auto").strategy) == "auto"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", {"accelerator": "cpu", "devices": "auto"}),
        ("gpu", {"accelerator": "gpu", "devices": "auto"}),
        ("multi_node", {"accelerator": "gpu", "num_nodes": 2}),
        ("debug", {"max_epochs": 1, "detect_anomaly": True}),
    ],
)
def test_trainer_variants_build_on_the_default(name: str, expected: dict[str, Any]) -> None:
    default, trainer = config().trainer, config(f"trainer={name}").trainer
    assert {key: trainer[key] for key in expected} == expected
    assert set(default) <= set(trainer)
    assert trainer.default_root_dir == "out"


def test_callbacks_default_keeps_the_best_checkpoint() -> None:
    checkpoint = instantiate(config().callbacks.model_checkpoint)
    assert isinstance(checkpoint, ModelCheckpoint)
    assert (checkpoint.monitor, checkpoint.mode) == ("val_acc", "max")
    assert Path(checkpoint.dirpath) == Path("out/checkpoints").resolve()


def test_callbacks_early_stopping_adds_to_the_default() -> None:
    callbacks = config("callbacks=early_stopping").callbacks
    assert list(callbacks) == ["model_checkpoint", "last_checkpoint", "early_stopping"]
    assert isinstance(instantiate(callbacks.early_stopping), EarlyStopping)


def test_callbacks_exact_resume_adds_to_the_default() -> None:
    callbacks = config("callbacks=exact_resume").callbacks
    assert list(callbacks) == ["model_checkpoint", "last_checkpoint", "exact_resume"]
    assert isinstance(instantiate(callbacks.exact_resume), ExactResume)


def test_callbacks_non_finite_adds_to_the_default() -> None:
    callbacks = config("callbacks=non_finite", "callbacks.non_finite.action=skip").callbacks
    assert list(callbacks) == ["model_checkpoint", "last_checkpoint", "non_finite"]
    guard = instantiate(callbacks.non_finite)
    assert isinstance(guard, NonFiniteGuard)
    assert guard.action == "skip"


def test_callbacks_oom_adds_to_the_default() -> None:
    callbacks = config("callbacks=oom", "callbacks.out_of_memory.parts=2").callbacks
    assert list(callbacks) == ["model_checkpoint", "last_checkpoint", "out_of_memory"]
    guard = instantiate(callbacks.out_of_memory)
    assert isinstance(guard, OutOfMemoryGuard)
    assert guard.parts == 2


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_none_is_an_empty_node(group: str) -> None:
    assert config(f"{group}=none")[group] == {}


def test_logger_csv_writes_right_into_the_output_directory() -> None:
    logger = instantiate(config().logger.csv)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    assert sorted(path.name for path in Path("out").iterdir()) == ["hparams.yaml", "metrics.csv"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For a network this small a second thread costs time, on a busy machine a lot of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batch_size", [64, 128])  # two processes of ddp make 128
def test_default_config_learns_digits(batch_size: int) -> None:
    cfg = config(
        f"data.batch_size={batch_size}", "trainer=cpu", "trainer.enable_progress_bar=false"
    )
    torch.manual_seed(cfg.seed)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False)
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data)[0]["test_acc"] >= 0.97
    assert trainer.test(datamodule=data, ckpt_path="best")[0]["test_acc"] >= 0.97
