"""A Hydra application that trains on two ranks."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parent.parent))


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="ddp")
def main(cfg: DictConfig) -> None:
    import boring

    class Mine(boring.Classifier):
        def on_train_epoch_start(self) -> None:
            seen = self.all_gather(boring.torch.tensor(cfg.lr, dtype=boring.torch.float64))
            assert (seen == cfg.lr).all()  # the same trial on every rank
            assert self.trainer.world_size == 2

        def configure_optimizers(self) -> boring.torch.optim.Optimizer:
            return boring.torch.optim.SGD(self.parameters(), lr=cfg.lr)

    boring.trainer(cfg.strategy, 2, max_epochs=4).fit(Mine(), datamodule=boring.Blobs())


if __name__ == "__main__":
    main()
