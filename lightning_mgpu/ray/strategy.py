"""Distributed data parallel on the workers of a Ray cluster."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy as _LightningDDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_mgpu.ray import inside, session, trial
from lightning_mgpu.ray.launcher import RayLauncher
from lightning_mgpu.ray.place import Place, RayEnvironment

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__: list[str] = []


class RayStrategy(_LightningDDPStrategy):
    """Lightning's DDP, whose ranks are Ray actors; the program itself stays where it is.

    The Trainer is pickled and sent to the workers. When they are done, their weights, metrics,
    progress, callbacks and optimizers are those of the Trainer here. The workers stay for later
    calls, of this trainer and of others.

    Args:
        num_workers: Number of workers, each with one rank.
        num_cpus_per_worker: CPUs to reserve for each; also its intra-op threads.
        use_gpu: Whether each worker gets a GPU and trains on it.
        init_hook: Called on each worker when it has started, before anything is unpickled.
        resources_per_worker: More to reserve for each worker. ``CPU`` and ``GPU`` go before the
            arguments above.
        max_failures: How often `fit` may lose workers and go on with new ones, from the end of the
            last whole epoch. The state of training then comes here after each epoch.
        **ddp_kwargs: As Lightning's `DDPStrategy`, and through it
            `torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: An argument is out of range.
    """

    strategy_name = "ddp_ray"
    runs_elsewhere = True
    """Nothing is trained in the process that calls the Trainer."""

    def __init__(
        self,
        num_workers: int = 1,
        num_cpus_per_worker: float = 1,
        use_gpu: bool = False,
        init_hook: Callable[[], Any] | None = None,
        resources_per_worker: Mapping[str, float] | None = None,
        max_failures: int = 0,
        **ddp_kwargs: Any,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"`num_workers={num_workers}`: expected 1 or more.")
        if max_failures < 0:
            raise ValueError(f"`max_failures={max_failures}`: expected 0 or more.")
        resources = {
            "CPU": float(num_cpus_per_worker),
            "GPU": float(use_gpu),
            **(resources_per_worker or {}),
        }
        for name, amount in resources.items():
            if amount < 0:
                raise ValueError(f"Resource {name}={amount} of each worker: expected 0 or more.")
        if resources["GPU"] > 1:
            raise ValueError(
                f"`resources_per_worker={dict(resources_per_worker or {})}`: a worker is one"
                " process and trains on one GPU. Ask for more workers instead."
            )
        self.num_workers = num_workers
        self.use_gpu = resources["GPU"] > 0
        self.init_hook = init_hook
        self.max_failures = max_failures
        self._resources = {name: amount for name, amount in resources.items() if amount}
        super().__init__(cluster_environment=RayEnvironment(num_workers), **ddp_kwargs)

    @property
    def threads_per_worker(self) -> int:
        """Intra-op threads of each worker."""
        return max(1, int(self._resources.get("CPU", 1)))

    def group(self) -> session.Group:
        """What to ask Ray for."""
        return session.Group(
            size=self.num_workers,
            resources=tuple(sorted(self._resources.items())),
            hook=None if self.init_hook is None else cloudpickle.dumps(self.init_hook),
            trial=trial.reserved(self.num_workers, self._resources),
        )

    def check(self, trainer: "Trainer") -> None:
        """Refuse what contradicts the number of workers.

        Raises:
            MisconfigurationException: Says which argument of the Trainer is at fault.
        """
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"`Trainer(num_nodes={self.num_nodes})`: Ray chooses the nodes for"
                f" `RayStrategy(num_workers={self.num_workers})`. Leave `num_nodes` out."
            )
        # What Lightning makes of `devices="auto"` is all that this machine has.
        count = len(self.parallel_devices or ())
        if isinstance(self.accelerator, CPUAccelerator) and count not in (1, self.num_workers):
            raise MisconfigurationException(
                f"`Trainer(devices={count})` and `RayStrategy(num_workers={self.num_workers})`:"
                " each worker is one device. Leave `devices` out."
            )

    def take_place(self, place: Place) -> None:
        """Become the strategy of one worker."""
        environment = self._environment
        environment.place = place
        self.num_nodes = place.num_nodes
        self.accelerator = CUDAAccelerator() if self.use_gpu else CPUAccelerator()
        # Ray shows each worker its own GPU only.
        device = torch.device("cuda", 0) if self.use_gpu else torch.device("cpu")
        self.parallel_devices = [device] * place.local_world_size
        self.set_world_ranks()

    @property
    def _environment(self) -> RayEnvironment:
        assert isinstance(self.cluster_environment, RayEnvironment)
        return self.cluster_environment

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Nodes may hold different numbers of workers.
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def set_world_ranks(self) -> None:
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def _configure_launcher(self) -> None:
        # A worker of Ray Train is a rank already.
        self._launcher = None if inside.take_place(self) else RayLauncher(self)

    @override
    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        self._environment.place.join_group(
            self._process_group_backend,
            self._timeout or default_pg_timeout,
            device_id=self.root_device if self.root_device.type != "cpu" else None,
        )
