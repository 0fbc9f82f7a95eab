"""Fully sharded data parallel on the workers of a Ray cluster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from lightning.fabric.strategies.fsdp import _get_full_state_dict_context
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mgpu.launch.errors import LaunchError
from lightning_mgpu.ray import connection
from lightning_mgpu.ray.gathered_state import GatheredState, tensors_of
from lightning_mgpu.ray.strategy import LaunchedOnRay
from lightning_mgpu.ray.worker_group import WorkerRequest

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RayShardedStrategy(LaunchedOnRay, FSDPStrategy):
    """Lightning's FSDP on the GPUs of a Ray cluster, while the program stays where it is.

    Parameters, gradients and optimizer state are shared out among the workers. When they are done,
    the whole of the weights and of the optimizers is put together on rank 0 and returns to the
    Trainer here, as with `RayStrategy`. So one machine's memory has to hold them, while no GPU has
    to.

    Args:
        num_workers: As `RayStrategy`.
        num_cpus_per_worker: As `RayStrategy`.
        use_gpu: Has to be true, as it is by default: FSDP needs a GPU for each worker.
        init_hook: As `RayStrategy`.
        resources_per_worker: As `RayStrategy`.
        max_failures: As `RayStrategy`.
        storage_path: As `RayStrategy`.
        placement_strategy: As `RayStrategy`.
        **kwargs: As Lightning's `FSDPStrategy`, and through it
            `torch.distributed.fsdp.FullyShardedDataParallel`.

    Raises:
        ValueError: An argument is out of range, or workers have no GPU.
    """

    strategy_name = "fsdp_ray"

    def __init__(
        self,
        num_workers: int | Sequence[int] = 1,
        num_cpus_per_worker: float = 1,
        use_gpu: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_workers, num_cpus_per_worker, use_gpu, *args, **kwargs)
        if not self.use_gpu:
            raise ValueError(
                f"`RayShardedStrategy(use_gpu={use_gpu})`: FSDP shards a model over GPUs, and these"
                " workers have none. Ask for `use_gpu=True`; on CPUs use `RayStrategy`, or"
                " `RayPipelineStrategy` for a model in stages."
            )
        if not self.kwargs["use_orig_params"]:
            raise ValueError(
                "`RayShardedStrategy(use_orig_params=False)`: the optimizers could not return to"
                " this process, whose parameters are the original ones. Leave it out."
            )

    @override
    def group(self) -> WorkerRequest:
        if "GPU" in self._resources and connection.is_ours() and not torch.cuda.is_available():
            raise LaunchError(
                f"`RayShardedStrategy(num_workers={self.num_workers})` trains on GPUs only, and"
                " this machine has none. Connect to a cluster that has: `ray.init('auto')`,"
                " `ray.init('ray://...')` or RAY_ADDRESS. On CPUs use `RayStrategy`."
            )
        return super().group()

    @override
    def setup_environment(self) -> None:
        # Lightning's own then finds the group, and writes no environment variable.
        self.setup_distributed()
        super().setup_environment()

    @override
    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        self._names = list(tensors_of(model))
        return super()._setup_model(model)

    @override
    def gather(self, trainer: "Trainer") -> GatheredState:
        fitted = trainer.state.fn == TrainerFn.FITTING
        weights = self._weights() if fitted or trainer.ckpt_path else None
        return GatheredState(weights, self._optimizer_states() if fitted else None)

    @override
    def dump_checkpoint(self, trainer: "Trainer") -> dict[str, Any]:
        with self._in_one_file():
            return super().dump_checkpoint(trainer)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._is_sharded():
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._is_sharded():
            return super().optimizer_state(optimizer)
        return Strategy.optimizer_state(self, optimizer)

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if self._is_sharded() else self._in_one_file():
            super().save_checkpoint(*args, **kwargs)

    @override
    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Lightning has all ranks load rank 0's path; that to go on from is each rank's own.
        own = str(checkpoint_path).startswith("/proc/self/")
        with patch.object(self, "broadcast", lambda path: path) if own else nullcontext():
            return super().load_checkpoint(checkpoint_path, weights_only)

    def _is_sharded(self) -> bool:
        """Return whether the model is sharded, as on workers and not on the driver."""
        assert self.model is not None
        return any(isinstance(part, FullyShardedDataParallel) for part in self.model.modules())

    @contextmanager
    def _in_one_file(self) -> Iterator[None]:
        with patch.object(self, "_state_dict_type", "full"):
            yield

    def _weights(self) -> dict[str, torch.Tensor]:
        """All tensors of the model, on rank 0; collective."""
        assert self.lightning_module is not None
        with self._in_one_file():
            # Buffers are everywhere, and some of them are not in the state dict.
            found = {**tensors_of(self.lightning_module), **self.lightning_module_state_dict()}
        return {name: found[name].detach() for name in self._names}

    def _optimizer_states(self) -> list[dict[str, Any]]:
        assert self.model is not None
        # Annotated as the generator beneath its `contextmanager`.
        with _get_full_state_dict_context(self.model, self.world_size):  # type: ignore[attr-defined]
            states = [
                FullyShardedDataParallel.optim_state_dict(self.model, optimizer)
                for optimizer in self.optimizers
            ]
        return [state.get("state", {}) for state in states]
