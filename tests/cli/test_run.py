"""`train(cfg)` called by a program of one's own, outside Hydra."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boring
import pytest
import torch
from command import write_project
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mgpu.cli.run import RunResult, train
from lightning_mgpu.demo.data import Digits
from lightning_mgpu.demo.mlp import MLP
from lightning_mgpu.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Experiment logs directory .* exists and is not empty",
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",
        "Attribute 'layer' is an instance of `nn.Module`",
        "Using `DistributedSampler` with the dataloaders",
    )
]

_QUIET = (
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "++trainer.limit_train_batches=2",
    "++trainer.enable_progress_bar=false",
    "++trainer.enable_model_summary=false",
)


def _config(*overrides: str, output_dir: str | None = "out") -> DictConfig:
    """The shipped config, composed without `hydra.main`."""
    with initialize_config_module("lightning_mgpu.conf", version_base="1.3"):
        cfg = compose("config", [*_QUIET, *overrides])
    if output_dir is not None:
        cfg.output_dir = output_dir
    return cfg


def _boring(*overrides: str, **model: Any) -> DictConfig:
    """A small model and its data, without Hydra at all."""
    cfg = OmegaConf.create(
        {
            "model": {"_target_": "boring.Classifier", **model},
            "data": {"_target_": "boring.Blobs"},
            "trainer": {
                "_target_": "lightning.pytorch.Trainer",
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 2,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": "out",
            },
            "output_dir": "out",
        }
    )
    with open_dict(cfg):
        cfg.merge_with_dotlist(list(overrides))
    return cfg


def test_result_of_a_fit(tmp_path: Path) -> None:
    cfg = _config("model=mlp")
    result = train(cfg)
    assert isinstance(result, RunResult)
    assert isinstance(result.trainer, Trainer)
    assert isinstance(result.model, MLP)
    assert isinstance(result.datamodule, Digits)
    assert result.output_dir == Path("out")
    assert set(result.metrics) == {"train_loss", "val_loss", "val_acc", "test_loss", "test_acc"}
    assert result.metric == result.metrics["val_acc"]
    assert set(result.files) == {"config", "best checkpoint", "last checkpoint", "metrics"}
    assert all(path.is_file() for path in result.files.values())
    assert all(path.resolve().is_relative_to(tmp_path) for path in result.files.values())
    assert OmegaConf.load(result.files["config"]) == OmegaConf.create(
        OmegaConf.to_container(cfg, resolve=True)
    )


def test_result_of_an_evaluation() -> None:
    fit = train(_config("model=mlp"))
    checkpoint = f"ckpt_path={fit.files['best checkpoint']}"
    result = train(_config("model=mlp", "mode=test", checkpoint, output_dir="test"))
    assert result.metrics == {k: v for k, v in fit.metrics.items() if k.startswith("test")}
    assert result.metric is None
    assert result.files == {"config": Path("test/config.yaml")}


def test_config_needs_no_more_than_model_and_trainer() -> None:
    cfg = _boring()
    result = train(cfg)
    assert set(result.metrics) > {"train_loss", "val_loss", "val_acc", "test_loss"}
    assert result.metric is None
    assert result.trainer.current_epoch == 2
    assert set(result.files) == {"config", "last checkpoint"}  # none is better: no monitor


def test_config_is_not_changed() -> None:
    cfg = _boring(**{"features": 6})
    before = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    train(cfg)
    assert cfg == before


def test_output_directory_must_be_set_outside_hydra() -> None:
    with pytest.raises(ConfigError, match=r"output_dir: .*cfg\.output_dir = 'outputs/my_run'"):
        train(_config(output_dir=None))
    assert not os.listdir()


def test_output_directory_is_made_with_its_parents() -> None:
    result = train(_boring("output_dir=a/b/c"))
    assert result.files["config"] == Path("a/b/c/config.yaml")
    assert result.files["config"].is_file()


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "none"])
def test_loggers_write_into_the_output_directory(logger: str, tmp_path: Path) -> None:
    train(_config("model=mlp", f"logger={logger}"))
    assert os.listdir() == ["out"]
    assert (tmp_path / "out" / "metrics.csv").exists() == (logger == "csv")
    assert (tmp_path / "out" / "tensorboard").exists() == (logger == "tensorboard")


def test_metric_is_the_best_value_not_the_last() -> None:
    write_project()
    cfg = _config("trainer.max_epochs=3")
    cfg.model = {"_target_": "my_project.LitModel"}
    result = _train_here(cfg)
    assert result.metrics["val_acc"] == pytest.approx(1 / 3)
    assert result.metric == 1.0


def test_metric_that_is_not_monitored_is_the_last_value() -> None:
    result = train(_boring("metric=train_loss"))
    assert result.metric == result.metrics["train_loss"]


def test_metric_of_a_monitor_beside_others() -> None:
    cfg = _config("model=mlp", "metric=val_loss", "callbacks.model_checkpoint.monitor=val_acc")
    with open_dict(cfg):
        cfg.callbacks.by_loss = {
            "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
            "dirpath": "out/by_loss",
            "monitor": "val_loss",
        }
    result = train(cfg)
    assert result.metric == pytest.approx(result.metrics["val_loss"])
    assert result.files["best checkpoint"].parent == Path("out/checkpoints").absolute()
    monitors = [c.monitor for c in result.trainer.checkpoint_callbacks if _is_checkpoint(c)]
    assert monitors == ["val_acc", None, "val_loss"]


def _is_checkpoint(callback: Any) -> bool:
    return isinstance(callback, ModelCheckpoint)


def test_metric_that_is_a_loss_is_minimised() -> None:
    cfg = _config("model=mlp", "metric=val_loss", "metric_mode=min", "trainer.max_epochs=2")
    result = train(cfg)
    checkpoint = next(filter(_is_checkpoint, result.trainer.checkpoint_callbacks))
    assert (checkpoint.monitor, checkpoint.mode) == ("val_loss", "min")
    assert result.metric is not None
    assert result.metric <= result.metrics["val_loss"] + 1e-9


def test_metric_that_is_a_loss_and_not_minimised_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "lightning_mgpu"):
        train(_config("model=mlp", "metric=val_loss"))
    assert "keeps the worst; set metric_mode=min" in caplog.text


@pytest.mark.parametrize("callbacks", ["default", "early_stopping"])
def test_metric_that_the_model_does_not_log_is_refused(callbacks: str) -> None:
    cfg = _config("model=mlp", "metric=val_f1", f"callbacks={callbacks}")
    with pytest.raises(ConfigError, match=r"metric=val_f1: .*val_loss.*Set `metric=`"):
        train(cfg)


def test_metric_never_logged_is_none_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightning_mgpu"):
        result = train(_boring("metric=val_f1"))
    assert result.metric is None
    message = caplog.messages[-1]
    assert message.startswith("metric=val_f1 was never logged, so the run has no result for a swe")
    assert message.endswith(
        "test_loss, train_loss, train_loss_epoch, train_loss_step, val_acc, val_loss."
    )


def test_metric_monitored_but_never_logged_is_none_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a validation loop Lightning does not mind; there is nothing to keep."""
    cfg = _config("model=mlp", "++trainer.limit_val_batches=0")
    with (
        caplog.at_level(logging.WARNING, "lightning_mgpu"),
        pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='val_acc'\)"),
    ):
        result = train(cfg)
    assert result.metric is None
    assert "metric=val_acc was never logged" in caplog.text


def test_no_metric_wanted_is_none_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    result = train(_boring("metric=null"))
    assert result.metric is None
    assert "never logged" not in caplog.text


def _train_here(cfg: DictConfig) -> RunResult:
    """`train`, with modules of the current directory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(Path.cwd())
        try:
            return train(cfg)
        finally:
            sys.modules.pop("my_project", None)


def test_model_without_test_step_is_not_tested() -> None:
    write_project(
        "class Untested(LitModel):\n"
        "    test_step = LightningModule.test_step\n"
        "    predict_step = None\n"
    )
    cfg = _config()
    cfg.model = {"_target_": "my_project.Untested"}
    result = _train_here(cfg)
    assert set(result.metrics) == {"train_loss", "val_acc"}
    assert result.metric == 1.0


def test_data_without_test_loader_is_not_tested() -> None:
    write_project(
        "class Untested(LitData):\n    test_dataloader = LightningDataModule.test_dataloader\n"
    )
    cfg = _config()
    cfg.model = {"_target_": "my_project.LitModel"}
    cfg.data = {"_target_": "my_project.Untested"}
    assert set(_train_here(cfg).metrics) == {"train_loss", "val_acc"}


def test_callable_target_may_build_the_model() -> None:
    write_project("def build(rate):\n    return LitModel(lr=rate)\n")
    cfg = _config()
    cfg.model = {"_target_": "my_project.build", "rate": 0.5}
    result = _train_here(cfg)
    assert result.model.hparams["lr"] == 0.5


def test_nested_targets_are_built() -> None:
    write_project(
        "class Composed(LitModel):\n"
        "    def __init__(self, layer: torch.nn.Module, options: dict) -> None:\n"
        "        super().__init__()\n"
        "        self.layer, self.options = layer, options\n"
    )
    cfg = _config()
    cfg.model = {
        "_target_": "my_project.Composed",
        "layer": {"_target_": "torch.nn.Linear", "in_features": 64, "out_features": 10},
        "options": {"sizes": [1, 2]},
    }
    model: Any = _train_here(cfg).model
    assert type(model.layer) is torch.nn.Linear
    assert model.options == {"sizes": [1, 2]}
    assert (type(model.options), type(model.options["sizes"])) == (dict, list)


def test_config_objects_stay_on_request() -> None:
    """They are among the hyperparameters too, and the run can load its own checkpoint."""
    write_project(
        "class Keeps(LitModel):\n"
        "    def __init__(self, options) -> None:\n"
        "        super().__init__()\n"
        "        self.options = options\n"
    )
    cfg = _config()
    cfg.model = {"_target_": "my_project.Keeps", "options": {"a": 1}, "_convert_": "none"}
    assert isinstance(_train_here(cfg).model.options, DictConfig)


def test_predictions_are_in_dataset_order() -> None:
    fit = train(_boring())
    checkpoint = f"ckpt_path={fit.files['last checkpoint']}"
    result = train(_boring("mode=predict", checkpoint, "data.batch_size=5"))
    predictions = torch.load(result.files["predictions"], weights_only=True)
    with torch.no_grad():
        expected = result.model(boring.blobs()[:][0])
    assert torch.allclose(predictions, expected)
    assert result.files["predictions"] == Path("out/predictions.pt")
    assert (result.metrics, result.metric) == ({}, None)


@pytest.mark.parametrize("devices", [2, 3])
def test_predictions_of_ddp_equal_those_of_one_process(devices: int) -> None:
    fit = train(_boring())
    arguments = (
        "mode=predict",
        f"ckpt_path={fit.files['last checkpoint']}",
        "data.batch_size=5",
        "data.size=47",  # neither batches nor ranks come out even
    )
    single = train(_boring(*arguments, "output_dir=single"))
    several = train(
        _boring(
            *arguments,
            "output_dir=several",
            "strategy._target_=lightning_mgpu.strategies.DDPStrategy",
            f"trainer.devices={devices}",
        )
    )
    one, other = (
        torch.load(result.files["predictions"], weights_only=True) for result in (single, several)
    )
    assert one.shape == (47, 3)
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_predictions_of_several_loaders_are_a_list() -> None:
    write_project(
        "class Two(LitData):\n"
        "    def predict_dataloader(self):\n"
        "        return [self._dataloader(), LitData(8)._dataloader()]\n"
        "class Predicts(LitModel):\n"
        "    def predict_step(self, batch, batch_idx, dataloader_idx=0):\n"
        "        return {'label': batch[1], 'loader': torch.full_like(batch[1], dataloader_idx)}\n"
    )
    cfg = _config("mode=predict")
    cfg.model = {"_target_": "my_project.Predicts"}
    cfg.data = {"_target_": "my_project.Two"}
    first, second = torch.load(_train_here(cfg).files["predictions"], weights_only=True)
    assert first["label"].tolist() == [i % 10 for i in range(24)]
    assert second["loader"].tolist() == [1] * 8


def test_metrics_of_ddp_are_those_of_all_ranks() -> None:
    """Two processes with batches of four are one with batches of eight."""
    one = train(_boring("data.batch_size=8", "output_dir=one"))
    two = train(
        _boring(
            "output_dir=two",
            "data.world_size=2",
            "trainer.use_distributed_sampler=false",
            "strategy._target_=lightning_mgpu.strategies.DDPStrategy",
            "trainer.devices=2",
        )
    )
    for name in ("val_loss", "val_acc", "test_loss"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], abs=1e-9)


def test_seed_is_taken_out_of_the_environment_again() -> None:
    before = dict(os.environ)
    train(_boring("seed=5"))
    assert dict(os.environ) == before


def test_seed_of_the_caller_stays() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            monkeypatch.setenv(name, "0")
        seed_everything(11, workers=True, verbose=False)
        train(_boring("seed=5"))
        assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("11", "1")
        train(_boring())
        assert os.environ["PL_GLOBAL_SEED"] == "11"


def test_seed_repeats_a_run() -> None:
    first, again, other = (
        train(_config("model=lenet", f"seed={seed}", output_dir=f"out{i}")).metrics
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_seed_and_environment_are_restored_after_an_error() -> None:
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="cannot be imported"):
        train(_boring("seed=5", "model._target_=nope.Nope"))
    assert dict(os.environ) == before


def test_runs_follow_one_another_in_one_process() -> None:
    first = train(_boring("output_dir=first", "trainer.max_epochs=1"))
    checkpoint = f"ckpt_path={first.files['last checkpoint']}"
    second = train(_boring("output_dir=second", checkpoint))
    assert first.trainer is not second.trainer
    assert (first.trainer.current_epoch, second.trainer.current_epoch) == (1, 2)
    assert second.trainer.global_step == 2 * first.trainer.global_step


def test_run_in_a_thread() -> None:
    """Only the main thread may set signal handlers; Ray Tune, say, runs functions in another."""
    with ThreadPoolExecutor(1) as executor:
        result = executor.submit(train, _boring()).result(timeout=60)
    assert result.trainer.state.finished


@pytest.mark.parametrize("key", ["model", "trainer"])
def test_missing_part_is_named(key: str) -> None:
    cfg = _boring()
    with open_dict(cfg):
        del cfg[key]
    with pytest.raises(ConfigError, match=rf"^{key}: expected a node with `_target_`, got None\.$"):
        train(cfg)


def test_finished_run_resumed_without_its_best_checkpoint() -> None:
    """Nothing is left to train, and what the checkpoint calls the best is gone."""
    fit = train(_config("model=mlp"))
    fit.files["best checkpoint"].unlink()
    last = f"ckpt_path={fit.files['last checkpoint']}"
    result = train(_config("model=mlp", last, output_dir="again"))
    assert "best checkpoint" not in result.files
    assert set(result.metrics) == {"test_loss", "test_acc"}
    assert result.metric is None


def test_training_error_is_the_original() -> None:
    cfg = _boring("model.optimizer=nope")
    with pytest.raises(KeyError, match="nope"):
        train(cfg)
