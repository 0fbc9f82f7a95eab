"""Connect to the Ray cluster that a config names."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.ray_tune_sweeper.config import RayTuneSweeperConf
from lightning_mgpu.config.elsewhere import runs_elsewhere
from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.ray import STRATEGIES
from lightning_mgpu.ray.address import address_of, given, is_client


def is_laptop(cfg: DictConfig) -> bool:
    """Return whether the run is on a cluster that this machine is not part of."""
    options = _options(cfg.get("ray"))
    if _is_trial():  # which is there already
        return False
    return is_client(address_of(options)) if _is_on_ray(cfg, options) else False


def connect(strategy: Any, cfg: DictConfig) -> None:
    """Connect to the cluster that the config names, if the run is to be on one.

    Args:
        strategy: The one of the run.
        cfg: With or without the node `ray`, arguments of `ray.init`.

    Raises:
        ConfigError: There is no such cluster, or nothing that would run on it.
    """
    options = _options(cfg.get("ray"))
    if _is_trial():
        there = _options(HydraConfig.get().sweeper.ray)
        wrong = [name for name in options if there.get(name) != options[name]]
        if wrong:
            raise ConfigError(
                f"ray.{wrong[0]}={options[wrong[0]]}: trials run on the Ray of their sweep. Set"
                f" hydra.sweeper.ray.{wrong[0]} instead."
            )
        return
    if not runs_elsewhere(strategy):
        if options:
            name, value = next(iter(options.items()))
            raise ConfigError(
                f"ray.{name}={value}: nothing in this run uses Ray. Add `+strategy=ray`."
            )
        return
    from lightning_mgpu.ray import connection

    try:
        connection.connect(options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"ray: {one_line(error)}") from error


def _is_on_ray(cfg: DictConfig, options: dict[str, Any]) -> bool:
    """Return whether the run is on Ray, as far as the config shows before it is built."""
    strategy = cfg.get("strategy")
    target = strategy.get("_target_") if OmegaConf.is_dict(strategy) else strategy
    return "address" in options or str(target) in STRATEGIES


def _is_trial() -> bool:
    """Return whether this run is a trial of a sweep on Ray."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return bool(HydraConfig.get().sweeper.get("_target_") == RayTuneSweeperConf._target_)


def _options(node: Any) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else {}
    return given(options)
