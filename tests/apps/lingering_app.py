"""A Hydra application whose training takes `seconds` to end when it is stopped.

It lasts five epochs, or until there is a file `until`.
"""

import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig


class Lingers(Callback):
    """As a logger does that uploads what it has."""

    def __init__(self, seconds: float, output: Path, until: str | None) -> None:
        self.seconds, self.output, self.until = seconds, output, until

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.until is not None and Path(self.until).exists():
            trainer.should_stop = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        time.sleep(self.seconds)
        (self.output / "ended").write_text(str(trainer.current_epoch))


class Model(BoringModel):
    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)["x"]
        self.log("val_loss", loss)


@hydra.main(version_base="1.3", config_path="plain_conf", config_name="lingering")
def main(cfg: DictConfig) -> None:
    output = Path(HydraConfig.get().runtime.output_dir)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=5 if cfg.until is None else -1,
        logger=False,
        callbacks=[Lingers(cfg.seconds, output, cfg.until)],
        default_root_dir=output,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model())


if __name__ == "__main__":
    main()
