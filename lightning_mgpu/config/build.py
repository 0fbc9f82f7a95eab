"""Build a model, its data and a Trainer from a composed config."""

import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import hydra.utils
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, open_dict

from lightning_mgpu.config.arguments import accepted_keys, check_arguments, describe
from lightning_mgpu.config.elsewhere import runs_elsewhere
from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.strategies import DDPStrategy

log = logging.getLogger(__name__)

# What `devices: auto` means to a strategy for several devices on a machine without accelerators;
# each of them a whole pipeline, if processes have one.
_CPU_DEVICES = 2


@dataclass
class Parts:
    """Objects of a run."""

    model: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer


def build(cfg: DictConfig, callbacks: Sequence[Callback]) -> Parts:
    """Instantiate the objects that the config names.

    Args:
        cfg: As composed from `conf/`: the nodes `model`, `data`, `trainer` and, if wanted,
            `strategy`, `callbacks` and `logger`, each built through its `_target_`.
        callbacks: More callbacks, beside those of the config.

    Raises:
        ConfigError: A node cannot be built; the message names it.
    """
    datamodule = build_node(cfg, "data") if cfg.get("data") else None
    model = build_node(cfg, "model")
    extra: dict[str, Any] = {
        "callbacks": [*_build_each(cfg, "callbacks", Callback), *callbacks],
        "logger": _build_each(cfg, "logger", Logger) or False,
    }
    if cfg.get("strategy") is not None:
        extra["strategy"] = build_node(cfg, "strategy")
    trainer_cfg = _node(cfg, "trainer", "trainer").copy()
    if _wants_cpu_devices(trainer_cfg, extra.get("strategy")):
        trainer_cfg.devices = _CPU_DEVICES * getattr(extra["strategy"], "stages", 1)
    trainer = _build(trainer_cfg, "trainer", **extra)
    if isinstance(trainer, Trainer) and _would_rerun_a_sweep(trainer):
        if extra.get("strategy", trainer_cfg.get("strategy", "auto")) != "auto":
            raise ConfigError(
                f"strategy: {describe(type(trainer.strategy))} starts its processes by running the"
                " whole command again, so each would run every job of this multirun. Use"
                " `+strategy=ddp`, or `trainer.devices=1`."
            )
        log.info("In a multirun, several devices are trained with `lightning_mgpu.DDPStrategy`.")
        trainer = _build(trainer_cfg, "trainer", **{**extra, "strategy": DDPStrategy()})
    _check_type(model, LightningModule, "model")
    _check_type(datamodule, (LightningDataModule, type(None)), "data")
    _check_type(trainer, Trainer, "trainer")
    return Parts(model, datamodule, trainer)


def _check_type(obj: Any, kind: type | tuple[type, ...], path: str) -> None:
    if not isinstance(obj, kind):
        wanted = kind[0] if isinstance(kind, tuple) else kind
        raise ConfigError(
            f"{path}: {describe(type(obj))} is not a {describe(wanted)}"
            + (
                "; derive it from `lightning.pytorch`, not from `pytorch_lightning`, whose"
                " classes are different."
                if any(base.__module__.startswith("pytorch_lightning") for base in type(obj).mro())
                else "."
            )
        )


def _would_rerun_a_sweep(trainer: Trainer) -> bool:
    """Return whether other ranks would be started by running a multirun's `sys.argv` again."""
    launcher = trainer.strategy.launcher
    return (
        HydraConfig.initialized()
        and HydraConfig.get().mode == RunMode.MULTIRUN
        and isinstance(launcher, _SubprocessScriptLauncher)
        and not launcher.cluster_environment.creates_processes_externally
    )


def _build_each(cfg: DictConfig, group: str, kind: type) -> list[Any]:
    nodes = cfg.get(group) or DictConfig({})
    parts = []
    for name in map(str, nodes):
        if nodes[name] is not None:  # `callbacks.early_stopping=null` takes one out
            part = build_node(nodes, name, f"{group}.{name}")
            _check_type(part, kind, f"{group}.{name}")
            parts.append(part)
    return parts


def build_node(cfg: DictConfig, key: str, path: str | None = None) -> Any:
    """Instantiate one node.

    Args:
        cfg: The config that it is in.
        key: Its key there.
        path: Where it stands, for messages; default: at `key`.

    Raises:
        ConfigError: It cannot be built.
    """
    path = path or key
    return _build(_node(cfg, key, path), path)


def _node(cfg: DictConfig, key: str, path: str) -> DictConfig:
    node = cfg.get(key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{path}: expected a node with `_target_`, got {node!r}.")
    return node


def _build(node: DictConfig, path: str, **extra: Any) -> Any:
    target = _find_target(node, path)
    node = _without_foreign_defaults(node, target, path)
    try:
        check_arguments(node, target, path)
        if "_convert_" not in node:
            # Plain lists and dicts: a checkpoint that holds OmegaConf's, by way of
            # `save_hyperparameters`, would be refused when it is loaded.
            extra["_convert_"] = "all"
        return hydra.utils.instantiate(node, **extra)
    except ConfigError:
        raise
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{path}: {_explain(reason, node)}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {_explain(error, node)}") from error


def _find_target(node: DictConfig, path: str) -> Callable[..., Any]:
    name = node._target_
    try:
        target = pkgutil.resolve_name(str(name))
    except Exception as error:
        raise ConfigError(
            f"{path}._target_={name}: cannot be imported ({one_line(error)})."
            " Give the full dotted name, and start the command where Python finds the module."
        ) from error
    if not callable(target):
        raise ConfigError(f"{path}._target_={name}: is not a class or function.")
    return cast("Callable[..., Any]", target)


def _without_foreign_defaults(
    node: DictConfig, target: Callable[..., Any], path: str
) -> DictConfig:
    """Remove defaults that belong to a class which the user has replaced.

    ``model._target_=my_project.LitModel`` keeps the other keys of `conf/model/lenet.yaml`; those
    that `LitModel` does not know and nobody set by hand are left out, so that one line is enough.
    """
    known = accepted_keys(target)
    if known is None or not HydraConfig.initialized():
        return node
    overrides = HydraConfig.get().overrides.task
    if not any(override.lstrip("+").startswith(f"{path}._target_=") for override in overrides):
        return node
    by_hand = {override.lstrip("+").split("=", 1)[0] for override in overrides}
    by_hand |= {".".join(key.split(".")[: path.count(".") + 2]) for key in by_hand}
    foreign = [
        key
        for key in map(str, node)
        if key not in known and not key.startswith("_") and f"{path}.{key}" not in by_hand
    ]
    if not foreign:
        return node
    log.info("%s: %s does not take %s; left out.", path, describe(target), ", ".join(foreign))
    node = node.copy()
    with open_dict(node):
        for key in foreign:
            del node[key]
    return node


def _wants_cpu_devices(trainer: DictConfig, strategy: Any) -> bool:
    """Return whether ``devices: auto`` would give a multi-device strategy a single CPU."""
    if runs_elsewhere(strategy):
        return False  # it knows its devices
    if strategy in (None, "auto") or trainer.get("devices", "auto") != "auto":
        return False
    accelerator = trainer.get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def _explain(error: BaseException, node: DictConfig) -> str:
    line = one_line(error)
    if "No supported gpu backend" in line or "accelerator is not available" in line:
        line = (
            f"accelerator={node.get('accelerator')}, devices={node.get('devices')}: this machine"
            " has none of that kind. Use `trainer=cpu`."
        )
    if isinstance(error, ModuleNotFoundError) and "pip install" not in line and error.name:
        name = error.name.partition(".")[0]
        line += f". If that is a package, install it: `pip install {name}`."
    return line
