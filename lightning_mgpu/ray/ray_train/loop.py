"""What each worker of Ray Train does for `fit`."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import get_checkpoint

from lightning_mgpu.launch.process_state import ProcessState
from lightning_mgpu.ray.worker import adopt, set_by_ray


@dataclass(frozen=True)
class TrainLoop:
    """What each worker does."""

    state: ProcessState
    machine: str
    factory: bytes

    def __call__(self) -> None:
        adopt(self.state, self.machine, os.environ, set_by_ray())
        # By now it is known which of Lightning's packages is in use.
        from ray.train.lightning import RayTrainReportCallback

        from lightning_mgpu._compat.lightning import Trainer
        from lightning_mgpu.ray.ray_train.prepare import prepare_trainer

        trainer, model, *data = pickle.loads(self.factory)()
        assert isinstance(trainer, Trainer)
        prepare_trainer(trainer)
        names = ("train_dataloaders", "val_dataloaders")  # the former may be a data module
        where: dict[str, Any] = dict(zip(names, data, strict=False))
        checkpoint = get_checkpoint()
        if checkpoint is None:
            trainer.fit(model, **where)
            return
        with checkpoint.as_directory() as directory:
            path = Path(directory, RayTrainReportCallback.CHECKPOINT_NAME)
            # Of an earlier worker of this run, so whatever objects it holds may be loaded.
            trainer.fit(model, **where, ckpt_path=path, weights_only=False)
