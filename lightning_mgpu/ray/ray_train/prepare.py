"""Use a strategy inside an existing Ray Train worker."""

import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mgpu.ray.ranks import RankAssignment
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_mgpu.ray.on_ray import OnRay

__all__ = ["prepare_trainer"]


class TrainAssignment(RankAssignment):
    """Ranks of a Ray Train worker, whose process group exists already."""

    def join_group(self, *_: Any, **__: Any) -> None:
        """Check that the process group exists."""
        if not dist.is_initialized():
            raise RuntimeError(
                "Ray Train has formed no process group. Start the workers with"
                " `ray.train.torch.TorchTrainer`, or with `lightning_mgpu.ray.fit`."
            )


def place() -> TrainAssignment | None:
    """Ranks of this process among Ray Train's workers; `None` if it is none of them."""
    train = sys.modules.get("ray.train")  # without which there is no such worker
    if train is None:
        return None
    try:
        context = train.get_context()
    except (RuntimeError, DeprecationWarning):  # the latter in a trial of Ray Tune
        return None
    world_size, local = context.get_world_size(), context.get_local_world_size()
    node = context.get_node_rank()
    return TrainAssignment(
        context.get_world_rank(),
        world_size,
        local_rank=context.get_local_rank(),
        local_world_size=local,
        node_rank=node,
        # Ray does not say; nodes may hold different numbers of workers.
        num_nodes=max(node + 1, -(-world_size // local)),
    )


def take_place(strategy: "OnRay") -> bool:
    """Make `strategy` that of this worker; return whether this is one.

    Raises:
        MisconfigurationException: The strategy asks for other workers than there are.
    """
    here = place()
    if here is None:
        return False
    least, most = strategy.min_workers, strategy.num_workers
    name = type(strategy).__name__
    if most > 1 and not least <= here.world_size <= most:
        raise MisconfigurationException(
            f"`{name}(num_workers={most if least == most else (least, most)})` within a worker"
            f" of Ray Train, which has started {here.world_size}. Remove `num_workers` there."
        )
    from ray.train.torch import get_devices

    devices, each = get_devices(), strategy.devices_per_worker
    strategy.runs_elsewhere = False
    strategy.use_gpu = devices[0].type == "cuda"
    if strategy.use_gpu and len(devices) != each:
        raise MisconfigurationException(
            f"`{name}` trains on {each} GPU{'s' if each > 1 else ''} of each worker, and Ray Train"
            f" has given this one {len(devices)}. Set"
            f" `ScalingConfig(resources_per_worker={{'GPU': {each}}})`."
        )
    strategy.take_place(here)
    if strategy.use_gpu:
        # Workers of one node may see each other's.
        strategy.parallel_devices = devices * here.local_world_size
    return True


def prepare_trainer(trainer: "Trainer") -> "Trainer":
    """Check a Trainer within a worker of Ray Train, and make it report there.

    Unlike `ray.train.lightning.prepare_trainer` it takes any strategy whose ranks are those of Ray
    Train: ours, Ray's, or another with Ray's `RayLightningEnvironment`. Unless it has one, the
    Trainer gets a `RayTrainReportCallback`, which reports metrics and a checkpoint at the end of
    each epoch.

    Args:
        trainer: As the worker's function has made it.

    Returns:
        The same Trainer.

    Raises:
        MisconfigurationException: The process is no such worker, or the strategy takes it for
            another rank than it is.
    """
    here = place()
    if here is None:
        raise MisconfigurationException(
            "`prepare_trainer` works only in the function that `TorchTrainer` calls on its"
            " workers. Elsewhere, to train on Ray, use `Trainer(strategy=RayStrategy())`."
        )
    if (trainer.global_rank, trainer.world_size) != (here.rank, here.world_size):
        raise MisconfigurationException(
            f"`{type(trainer.strategy).__name__}` takes this worker for rank"
            f" {trainer.global_rank} of {trainer.world_size}, but for Ray Train it is rank"
            f" {here.rank} of {here.world_size}. Use `lightning_mgpu.ray.RayStrategy()`, or"
            " `plugins=[ray.train.lightning.RayLightningEnvironment()]`."
        )
    from ray.train.lightning import RayTrainReportCallback

    from lightning_mgpu.ray.ray_train.report import TrainReportCallback

    callbacks = callbacks_of(trainer)
    if not any(isinstance(callback, RayTrainReportCallback) for callback in callbacks):
        callbacks.append(TrainReportCallback())
    return trainer
