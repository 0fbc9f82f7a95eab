"""A Hydra application that trains with Lightning and knows nothing of sweeps."""

import hydra
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """Learns to tell the sign of a sum."""

    def __init__(self, lr: float, l1: int) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, l1), torch.nn.ReLU(), torch.nn.Linear(l1, 2)
        )

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=16)


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="config")
def main(cfg: DictConfig) -> float:
    torch.manual_seed(0)
    output = hydra.core.hydra_config.HydraConfig.get().runtime.output_dir
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=cfg.epochs,
        logger=CSVLogger(output, name="", version=""),
        callbacks=[ModelCheckpoint(f"{output}/checkpoints", monitor="val_loss")],
        default_root_dir=output,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=2,
    )
    trainer.fit(Net(cfg.model.lr, cfg.model.l1), loader(0), loader(1))
    return float(trainer.callback_metrics["val_loss"])


if __name__ == "__main__":
    main()
