"""A Hydra application of somebody who uses our strategy configs in their own project."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parent.parent))


@hydra.main(version_base="1.3", config_path="hydra_conf", config_name="config")
def main(cfg: DictConfig) -> float:
    import boring
    from hydra.utils import instantiate

    class Mine(boring.Classifier):  # defined in __main__, as users' classes often are
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.lr = lr

        def on_train_start(self) -> None:
            job = HydraConfig.get().job
            # Every rank must train the same job of the sweep.
            seen = self.all_gather(boring.torch.tensor(self.lr, dtype=boring.torch.float64))
            assert (seen == self.lr).all(), seen
            with open(f"rank-{self.global_rank}.txt", "a") as file:
                file.write(f"{job.num if 'num' in job else 0} {self.lr}\n")

        def configure_optimizers(self) -> boring.torch.optim.Optimizer:
            return boring.torch.optim.SGD(self.parameters(), lr=self.lr)

    strategy = instantiate(cfg.strategy) if "strategy" in cfg else "auto"
    devices = 1 if strategy == "auto" else 2
    trainer = boring.trainer(strategy, devices)
    model = Mine(cfg.optimizer.lr)
    trainer.fit(model, datamodule=boring.Blobs())
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK")
    assert not set(names) & set(os.environ)
    assert not boring.torch.distributed.is_initialized()
    Path("done.txt").write_text(f"{type(trainer.strategy).__name__} {trainer.world_size}\n")
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    main()
