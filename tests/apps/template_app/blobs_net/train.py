"""Trains what the configs name: every object comes from a `_target_`."""

import logging
import os
import sys
from pathlib import Path

import hydra
import lightning as L
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
os.environ["PROJECT_ROOT"] = str(ROOT)
sys.path.insert(0, str(ROOT))

from blobs_net.utils import instantiate_each, log_hyperparameters, metric_value  # noqa: E402

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict:
    """One training, and perhaps a test with the best weights; all metrics."""
    if cfg.get("seed") is not None:
        L.seed_everything(cfg.seed, workers=True)
    datamodule: L.LightningDataModule = hydra.utils.instantiate(cfg.data)
    log.info("Instantiating model <%s>", cfg.model._target_)
    model: L.LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_each(cfg.get("callbacks"))
    loggers = instantiate_each(cfg.get("logger"))
    trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    log_hyperparameters(cfg, model, trainer)
    trainer.fit(model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    metrics = dict(trainer.callback_metrics)
    if cfg.test:
        best = trainer.checkpoint_callback.best_model_path
        # The hyperparameters in it are more than tensors.
        trainer.test(model, datamodule, ckpt_path=best, weights_only=False)
        metrics |= trainer.callback_metrics
    return metrics


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig) -> float | None:
    return metric_value(train(cfg), cfg.get("optimized_metric"))


if __name__ == "__main__":
    main()
