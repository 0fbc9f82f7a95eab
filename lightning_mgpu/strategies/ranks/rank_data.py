"""DataLoaders of ranks that were launched with another process's pickled objects."""

from typing import TYPE_CHECKING, Any

from lightning_mgpu._compat.lightning import (
    MisconfigurationException,
    TrainerFn,
)
from lightning_mgpu._compat.lightning_data import samplers_of
from lightning_mgpu.strategies.ranks.sample_dealing import deal_out

if TYPE_CHECKING:
    from lightning_mgpu._compat.lightning import ParallelStrategy


def process_loader(strategy: "ParallelStrategy", loader: Any) -> None:
    """Prepare a loader for use in a launched rank.

    Raises:
        MisconfigurationException: The sampler is that of another rank.
    """
    checksamplers_of(loader, strategy.global_rank, strategy.world_size)
    module = strategy.lightning_module
    assert module is not None
    trainer = module.trainer
    if trainer.state.fn == TrainerFn.PREDICTING:
        deal_out(loader, trainer.limit_predict_batches, strategy.broadcast)


def checksamplers_of(loader: Any, rank: int, world_size: int) -> None:
    """Refuse samplers that were made for another rank.

    Under a launcher that runs the script again on each rank, a sampler that the script makes is
    that of its rank. Here it comes to all ranks as the calling process has made it.

    Raises:
        MisconfigurationException: Names the sampler, and says what to do instead.
    """
    for sampler in samplers_of(loader):
        own = (getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None))
        if not all(type(value) is int for value in own) or own == (rank, world_size):
            continue
        raise MisconfigurationException(
            f"The dataloader's `{type(sampler).__name__}(rank={own[0]},"
            f" num_replicas={own[1]})` is not that of rank {rank} of {world_size}: it was made"
            " before the ranks were launched, or with other numbers. Remove it, and Lightning"
            " adds one; or create the dataloader in `train_dataloader` or the like, with"
            " `rank=self.trainer.global_rank, num_replicas=self.trainer.world_size`. To give"
            " every rank all of the data, use `Trainer(use_distributed_sampler=False)`"
            " without such a sampler."
        )
