"""Which Ray cluster a config's run is to be on."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_mgpu.errors import ConfigError

_RAY_TUNE = "ray_tune_sweeper"  # in the sweeper's `_target_`


def is_laptop(cfg: DictConfig) -> bool:
    """Whether the run is on a cluster that this machine is no part of."""
    return str((cfg.get("ray") or {}).get("address")).startswith("ray://")


def connect(strategy: Any, cfg: DictConfig) -> None:
    """Find the cluster that the config names, if the run is to be on one.

    Args:
        strategy: The one of the run.
        cfg: With or without the node `ray`, arguments of `ray.init`.

    Raises:
        ConfigError: There is no such cluster, or nothing that would run on it.
    """
    node = cfg.get("ray") or DictConfig({})
    given = {str(name): value for name, value in node.items() if value is not None}
    sweeper = HydraConfig.get().sweeper if HydraConfig.initialized() else DictConfig({})
    if _RAY_TUNE in str(sweeper.get("_target_")) and HydraConfig.get().mode == RunMode.MULTIRUN:
        wrong = [name for name in given if sweeper.ray.get(name) != given[name]]
        if wrong:
            raise ConfigError(
                f"ray.{wrong[0]}={given[wrong[0]]}: trials run on the Ray of their sweep. Set"
                f" hydra.sweeper.ray.{wrong[0]} instead."
            )
        return
    if not getattr(strategy, "runs_elsewhere", False):
        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(
                f"ray.{name}={value}: nothing of this run would be on Ray. Add `+strategy=ray`."
            )
        return
    from lightning_mgpu.ray import cluster

    try:
        cluster.connect({name: _plain(value) for name, value in given.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"ray: {' '.join(str(error).split())}") from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
