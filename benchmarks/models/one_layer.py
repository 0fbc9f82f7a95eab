"""The model of `launch.py`, in a module that the processes of `ddp_spawn` can import."""

import lightning.pytorch as pl
import torch


class OneLayer(pl.LightningModule):
    """`features` squared float32 parameters."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(features, features, bias=False)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)
