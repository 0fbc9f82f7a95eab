"""The shipped configs, composed without a command."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

CONF = Path(__file__).parent.parent / "conf"


def config(*overrides: str) -> DictConfig:
    """Compose as the command does, with the outputs in the current directory."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*overrides, "output_dir=out"], return_hydra_config=True)
    with open_dict(cfg):
        del cfg["hydra"]  # needs a running Hydra to be resolved
    return cfg
