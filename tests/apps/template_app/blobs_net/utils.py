"""What the training script leaves to others."""

import hydra
from lightning import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf


def instantiate_each(cfg: DictConfig | None) -> list:
    """One object for each node that has a `_target_`."""
    return [hydra.utils.instantiate(node) for node in (cfg or {}).values() if "_target_" in node]


def log_hyperparameters(cfg: DictConfig, model: LightningModule, trainer: Trainer) -> None:
    """The config and the size of the model, for every logger."""
    parameters = {"parameters": sum(p.numel() for p in model.parameters())}
    for logger in trainer.loggers:
        logger.log_hyperparams({**OmegaConf.to_container(cfg, resolve=True), **parameters})


def metric_value(metrics: dict, name: str | None) -> float | None:
    """The value that a hyperparameter search goes by."""
    if not name:
        return None
    if name not in metrics:
        raise KeyError(f"{name} was not logged: is `optimized_metric` right?")
    return metrics[name].item()
