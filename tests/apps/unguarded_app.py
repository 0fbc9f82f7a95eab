"""A Hydra application that calls its main function whenever it is imported."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="slow")
def main(cfg: DictConfig) -> float:
    return float(cfg.x)


main()
