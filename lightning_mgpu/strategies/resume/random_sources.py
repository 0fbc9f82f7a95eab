"""Random generators and streams that a run draws from in this process."""

from typing import Any

import torch

from lightning_mgpu._compat.lightning import Trainer
from lightning_mgpu.engine.device import is_accelerator
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy


def accelerators(trainer: Trainer) -> list[torch.device]:
    """The devices of this process that have random generators of their own."""
    strategy = trainer.strategy
    devices = [strategy.root_device]
    for name in ("devices", "own_devices"):  # of replicas, and of stages
        devices += getattr(strategy, name, None) or []
    return [device for device in dict.fromkeys(devices) if is_accelerator(device)]


def random_streams(trainer: Trainer) -> dict[str, Any] | None:
    """The state of the strategy's random streams, if it has any."""
    strategy = trainer.strategy
    if not isinstance(strategy, MultiDeviceStrategy):
        return None
    return strategy.random_streams().state_dict()
