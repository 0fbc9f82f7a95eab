"""A Hydra application in one file: its config and its checkpoints name classes of the script."""

import enum
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import boring

torch.serialization.add_safe_globals([torch.nn.Softplus])
KINDS: dict[str, Any] = {}


class Act(enum.Enum):
    """Which activation."""

    relu = 0
    tanh = 1


@dataclass
class Model:
    """What is built, of the script's own."""

    _target_: str = "__main__.Net"
    act: Act = Act.relu
    lr: float = 0.1


@dataclass
class Config:
    """Of the whole application."""

    model: Model = field(default_factory=Model)
    strategy: str = "auto"
    devices: int = 1


ConfigStore.instance().store(name="config", node=Config)


class Net(boring.Classifier):
    """Keeps hyperparameters of classes of the script."""

    def __init__(self, act: Act, lr: float, extra: Any = None) -> None:
        super().__init__()
        assert act in (Act.relu, Act.tanh)  # by identity
        self.save_hyperparameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


KINDS["net"] = Net


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Any) -> None:
    output = HydraConfig.get().runtime.output_dir
    model = hydra.utils.instantiate(cfg.model, extra=torch.nn.Softplus())
    assert type(model) is KINDS["net"] is Net is sys.modules["__main__"].Net
    options = {"enable_checkpointing": True, "default_root_dir": output}
    trainer = boring.trainer(cfg.strategy, cfg.devices, **options)
    trainer.fit(model, datamodule=boring.Blobs())
    best = trainer.checkpoint_callback.best_model_path
    # (Pythons until 3.11.3 pickle members of enums by `getattr`.)
    torch.serialization.add_safe_globals([Act, getattr])
    trainer.test(model, datamodule=boring.Blobs(), ckpt_path=best, weights_only=True)
    Path(output, "loaded.txt").write_text(str(Net.load_from_checkpoint(best).hparams["act"]))


if __name__ == "__main__":
    main()
