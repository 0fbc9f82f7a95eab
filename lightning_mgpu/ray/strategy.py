"""Distributed data parallel on the workers of a Ray cluster."""

from abc import ABC

from typing_extensions import override

from lightning_mgpu._compat.lightning import MisconfigurationException
from lightning_mgpu.ray.launcher import RayLauncher
from lightning_mgpu.ray.on_ray import OnRay
from lightning_mgpu.ray.ray_train import prepare
from lightning_mgpu.strategies.ranks.rebuilt import RebuiltDDPStrategy


class LaunchedOnRay(OnRay, ABC):
    """Run the Trainer's entry points on the workers, unless this process is one of them."""

    @override
    def _configure_launcher(self) -> None:
        if self._has_trainer:
            raise MisconfigurationException(
                f"This `{type(self).__name__}` belongs to another Trainer already, whose model it"
                " holds. Create one for each Trainer: workers stay warm, whoever asks for them."
            )
        self._has_trainer = True
        # A worker of Ray Train is a rank already.
        self._launcher = None if prepare.take_place(self) else RayLauncher(self)


class RayStrategy(LaunchedOnRay, RebuiltDDPStrategy):
    """Lightning's DDP with Ray actors as ranks, while the program stays where it is.

    The Trainer is pickled and sent to the workers. When they are done, their weights, metrics,
    progress, callbacks and optimizers are those of the Trainer here. The workers stay for later
    calls, of this trainer and of others.

    Args:
        num_workers: Number of workers (default 1), each with one rank. Or (least, most): `fit`
            starts with as many as the cluster can give, and resumes with as many after a loss. The
            batch size is that of each worker, so a step's whole batch depends on their number.
        num_cpus_per_worker: CPUs to reserve for each (default 1); also its intra-op threads.
        use_gpu: Whether each worker gets a GPU and trains on it (default: no).
        init_hook: Called on each worker when it has started, before anything is unpickled.
        resources_per_worker: More to reserve for each worker. ``CPU`` and ``GPU`` go before the
            arguments above.
        max_failures: How often `fit` may lose workers and resume with new ones, from the end of the
            last complete epoch (default 0). The state then comes here after each epoch.
        storage_path: Write that state to a directory there instead: a path that all nodes share, or
            a URI (``s3://bucket/runs``). It is removed when training is done, and stays as a
            checkpoint for ``ckpt_path`` when it fails, also without `max_failures`.
        placement_strategy: On which nodes Ray places the workers: ``"PACK"`` (default: on as few as
            possible), ``"SPREAD"`` (on as many), ``"STRICT_PACK"`` (on one), ``"STRICT_SPREAD"``
            (each on another).
        **kwargs: As Lightning's `DDPStrategy`, and through it
            `torch.nn.parallel.DistributedDataParallel`; `detect_divergence` as our `DDPStrategy`.

    Raises:
        ValueError: An argument is out of range.
    """

    strategy_name = "ddp_ray"
