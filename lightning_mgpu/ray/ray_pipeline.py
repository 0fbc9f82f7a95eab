"""Pipeline parallelism on each worker of a Ray cluster, with DDP between them."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from lightning_mgpu.ray.strategy import LaunchedOnRay
from lightning_mgpu.strategies.pipeline_ddp import PipelineDDPStrategy


class RayPipelineStrategy(LaunchedOnRay, PipelineDDPStrategy):
    """Workers on a Ray cluster, each of which computes the model in stages.

    Within a worker `PipelineStrategy`, over GPUs or CPU threads of its own; between workers DDP,
    which averages gradients once a batch. All else is as with `RayStrategy`.

    Args:
        num_workers: As `RayStrategy`; samplers and `world_size` count workers.
        num_cpus_per_worker: CPUs to reserve for each worker, whose stages share them as threads.
            Default: one for each stage.
        use_gpu: Whether each worker gets `stages` GPUs and trains on them.
        init_hook: As `RayStrategy`.
        resources_per_worker: As `RayStrategy`.
        max_failures: As `RayStrategy`.
        storage_path: As `RayStrategy`.
        placement_strategy: As `RayStrategy`.
        stages: Devices of each worker, and stages of its pipeline (default 2), of which there are
            more with `stages_per_device`.
        **kwargs: As `PipelineStrategy` from `module` on, and as Lightning's `DDPStrategy`.

    Raises:
        ValueError: An argument is out of range or none of its choices.
    """

    strategy_name = "pipeline_ray"

    def __init__(
        self,
        num_workers: int | Sequence[int] = 1,
        num_cpus_per_worker: float | None = None,
        *args: Any,
        stages: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_workers,
            stages if num_cpus_per_worker is None else num_cpus_per_worker,
            *args,
            stages=stages,
            **kwargs,
        )

    @property
    @override
    def devices_per_worker(self) -> int:
        return self.stages

    @property
    @override
    def threads_per_device(self) -> int:
        return max(1, self.threads_per_worker // self.stages)

    @property
    @override
    def bound_device(self) -> None:
        """Always `None`: each stage's gradients are reduced between its own devices."""

    @override
    def _check_devices(self, count: int) -> None:
        """Accept any devices of the driver: a worker's devices come from its resources."""
