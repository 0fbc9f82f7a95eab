"""Launch DDP strategies of Lightning's by our pool."""

import functools
from typing import Any, cast

from lightning_mgpu._compat.lightning import DDPStrategy as _LightningDDPStrategy
from lightning_mgpu._compat.lightning_launchers import configure_launcher, set_start_method
from lightning_mgpu.strategies.distributed import DDPStrategy
from lightning_mgpu.strategies.ranks.environment import PoolEnvironment

__all__ = ["launch_by_pool"]


def launch_by_pool(strategy: _LightningDDPStrategy) -> None:
    """Give a strategy the launcher of `DDPStrategy`, however else it would start its processes.

    It stays an instance of its class, and is one of our `DDPStrategy` as well. Nobody else is
    expected to start the ranks, whatever cluster environment it was given.

    Args:
        strategy: Not in use yet; Lightning's `DDPStrategy` or derived from it.
    """
    if not isinstance(strategy, DDPStrategy):
        vars(strategy).pop("cluster_environment", None)  # a property of ours
        cast("Any", strategy).__class__ = _pooled(type(strategy))
    set_start_method(strategy, "popen")
    strategy.cluster_environment = PoolEnvironment()
    strategy.set_world_ranks()
    configure_launcher(strategy)


@functools.cache
def _pooled(kind: type[_LightningDDPStrategy]) -> type[DDPStrategy]:
    if kind is _LightningDDPStrategy:
        return DDPStrategy
    return type(kind.__name__, (DDPStrategy, kind), {"__doc__": kind.__doc__})
