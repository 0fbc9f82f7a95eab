"""A Hydra application for population-based training: the larger `lr`, the better its metric."""

import json
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """Writes down what its optimizer has at the start of each epoch."""

    def __init__(self, lr: float, decay: float) -> None:
        super().__init__()
        self.lr, self.decay = lr, decay
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("learnt", torch.zeros(()))

    def on_train_epoch_start(self) -> None:
        group = self.optimizers().param_groups[0]
        seen = {"epoch": self.current_epoch, "learnt": float(self.learnt), "asked": self.lr}
        seen |= {name: group[name] for name in ("lr", "weight_decay")}
        output = Path(HydraConfig.get().runtime.output_dir)
        with (output / "seen.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")

    def training_step(self, batch, batch_idx):
        self.learnt += self.lr
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_end(self) -> None:
        self.log("score", self.learnt)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.decay)


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="population")
def main(cfg: DictConfig) -> None:
    trainer = Trainer(
        strategy="auto" if cfg.strategy is None else instantiate(cfg.strategy),
        accelerator="cpu",
        max_epochs=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(cfg.lr, cfg.decay), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=4))


if __name__ == "__main__":
    main()
