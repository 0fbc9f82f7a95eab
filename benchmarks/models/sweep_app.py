"""The Hydra application of benchmarks/sweep.py."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="sweep_conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from sweep_training import fit

    return fit(cfg.lr, cfg.epochs, HydraConfig.get().runtime.output_dir)


if __name__ == "__main__":
    main()
