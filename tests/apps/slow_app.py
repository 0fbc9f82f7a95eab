"""A Hydra application whose job `x` waits until there is a file ``go-x``; no Lightning."""

import time
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="slow")
def main(cfg: DictConfig) -> float:
    with open(f"began-{cfg.x}", "a") as file:
        file.write("x")
    while not Path(f"go-{cfg.x}").exists():
        time.sleep(0.02)
    return float(cfg.x)


if __name__ == "__main__":
    main()
