"""Mixin for strategies whose ranks are workers on a Ray cluster, without the launching."""

import logging
import os
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_mgpu.ray import prepared_data, tune_placement, validation, worker_group
from lightning_mgpu.ray.epoch_checkpoint import CheckpointKeeper, DriverKeeper
from lightning_mgpu.ray.gathered_state import GatheredState
from lightning_mgpu.ray.ranks import RankAssignment, RayEnvironment
from lightning_mgpu.ray.trainer_state import weights_of
from lightning_mgpu.strategies.ranks.rank_data import process_loader

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)


class OnRay(ParallelStrategy, ABC):
    """Strategy whose ranks are Ray actors, while the program stays where it is.

    To be put before the strategy that trains. The arguments are described by `RayStrategy`.
    """

    strategy_name: str
    runs_elsewhere = True
    """Nothing is trained in the process that calls the Trainer."""

    num_nodes: int
    _process_group_backend: str | None
    _timeout: timedelta | None
    _get_process_group_backend: Callable[[], str]

    def __init__(
        self,
        num_workers: int | Sequence[int] = 1,
        num_cpus_per_worker: float = 1,
        use_gpu: bool = False,
        init_hook: Callable[[], Any] | None = None,
        resources_per_worker: Mapping[str, float] | None = None,
        max_failures: int = 0,
        storage_path: str | os.PathLike[str] | None = None,
        placement_strategy: str = "PACK",
        **kwargs: Any,
    ) -> None:
        self._has_trainer = False
        self.run_failed = False
        """Whether what this process holds is from before a run that has just failed."""
        self._trainers_accelerator: Accelerator | None = None
        self.min_workers, self.num_workers = validation.least_and_most(num_workers)
        validation.check_failures(max_failures)
        validation.check_placement(placement_strategy)
        super().__init__(cluster_environment=RayEnvironment(self.num_workers), **kwargs)
        self.init_hook = init_hook
        self.max_failures = max_failures
        self.storage_path = storage_path
        self.placement_strategy = placement_strategy
        self._resources = validation.resources(
            type(self).__name__,
            self.devices_per_worker,
            {
                "CPU": float(num_cpus_per_worker),
                "GPU": float(use_gpu and self.devices_per_worker),
                **(resources_per_worker or {}),
            },
        )
        self.use_gpu = "GPU" in self._resources

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The Trainer's accelerator.

        Not kept where Lightning does, which takes that for an argument of the strategy when a
        second Trainer comes, and complains about it.
        """
        return self._trainers_accelerator or self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._trainers_accelerator = accelerator

    @property
    def devices_per_worker(self) -> int:
        """Number of devices on which each worker trains."""
        return 1

    @property
    def threads_per_worker(self) -> int:
        """Intra-op threads of each worker."""
        return max(1, int(self._resources.get("CPU", 1)))

    def group(self) -> worker_group.WorkerRequest:
        """Request for workers."""
        group = worker_group.WorkerRequest(
            least=self.min_workers,
            most=self.num_workers,
            resources=tuple(sorted(self._resources.items())),
            hook=None if self.init_hook is None else cloudpickle.dumps(self.init_hook),
            placement=self.placement_strategy,
        )
        for count in range(self.num_workers, self.min_workers - 1, -1):
            if bundles := tune_placement.reserved(count, self._resources):
                return replace(group, least=count, most=count, trial=bundles)
        return group

    def keeper(self) -> CheckpointKeeper | None:
        """Keeper of the state after each epoch of `fit`; `None` if not asked for."""
        if self.storage_path is not None:
            from lightning_mgpu.ray.storage import StorageKeeper, absolute

            return StorageKeeper(absolute(self.storage_path))
        return DriverKeeper() if self.max_failures else None

    def check(self, trainer: "Trainer") -> None:
        """Refuse options that contradict the number of workers.

        Raises:
            MisconfigurationException: Says which argument of the Trainer is at fault.
        """
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"`Trainer(num_nodes={self.num_nodes})`: Ray chooses the nodes for"
                f" `{type(self).__name__}(num_workers={self.num_workers})`. Leave `num_nodes` out."
            )
        # What Lightning makes of `devices="auto"` is all that this machine has.
        count, each = len(self.parallel_devices or ()), self.devices_per_worker
        if isinstance(self.accelerator, CPUAccelerator) and count not in (
            1,
            self.num_workers * each,
        ):
            raise MisconfigurationException(
                f"`Trainer(devices={count})` and"
                f" `{type(self).__name__}(num_workers={self.num_workers})`: each worker has"
                f" {each} device{'s' if each > 1 else ''}. Leave `devices` out."
            )

    def take_place(self, place: RankAssignment) -> None:
        """Become the strategy of one worker."""
        environment = self._environment
        environment.place = place
        self.num_nodes = place.num_nodes
        self.accelerator = CUDAAccelerator() if self.use_gpu else CPUAccelerator()
        # Ray shows each worker its own GPUs only.
        own = [
            torch.device("cuda", index) if self.use_gpu else torch.device("cpu")
            for index in range(self.devices_per_worker)
        ]
        self.parallel_devices = own * place.local_world_size
        self.set_world_ranks()

    @property
    def bound_device(self) -> torch.device | None:
        """The device whose tensors this rank exchanges; `None` if there are several."""
        return self.root_device if self.root_device.type != "cpu" else None

    def gather(self, trainer: "Trainer") -> GatheredState:
        """Gather the tensors that rank 0 sends to the driver after a run; called on all ranks."""
        # A checkpoint that is only to be tested is loaded as well.
        changed = trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path
        return GatheredState(weights_of(trainer) if changed else None)

    def dump_checkpoint(self, trainer: "Trainer") -> dict[str, Any]:
        """Build a checkpoint that rank 0 can save alone; called on all ranks."""
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

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
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if self._launcher is not None:  # a worker of Ray Train runs a program of its own
            process_loader(self, dataloader)
        return dataloader

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self.run_failed:
            log.warning(
                "%s is not written when the run fails: the weights are lost with the workers,"
                " and those of this process are from before the run. `%s(storage_path=...)`"
                " keeps the state of the last complete epoch.",
                *(filepath, type(self).__name__),
            )
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def teardown(self) -> None:
        self.run_failed = False
        super().teardown()

    def set_world_ranks(self) -> None:
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_distributed(self) -> None:
        """Join the other ranks."""
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        self._environment.place.join_group(
            self._process_group_backend,
            self._timeout or default_pg_timeout,
            device_id=self.bound_device,
        )
        if self.lightning_module is not None:
            prepared_data.share_next(self.lightning_module.trainer)
