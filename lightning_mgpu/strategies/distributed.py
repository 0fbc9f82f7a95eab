"""Distributed data parallel: a process per device, launched by our own worker pool."""

import atexit
import functools
from typing import Any

import torch
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    ClusterEnvironment,
    LightningEnvironment,
    MisconfigurationException,
    _init_dist_connection,
    reset_seed,
)
from lightning_mgpu.engine.device import is_accelerator
from lightning_mgpu.launch.rank import leave_group
from lightning_mgpu.launch.rank_variables import come_from_a_launch
from lightning_mgpu.strategies.ranks.environment import PoolEnvironment
from lightning_mgpu.strategies.ranks.launcher import PoolLauncher
from lightning_mgpu.strategies.ranks.rank_data import process_loader
from lightning_mgpu.strategies.ranks.rebuilt import RebuiltDDPStrategy
from lightning_mgpu.strategies.ranks.recovery import Recovery


class DDPStrategy(RebuiltDDPStrategy):
    """Lightning's DDP, launched so that it works wherever Python runs.

    Stock DDP starts the other ranks by running ``sys.argv`` again, which repeats a whole Hydra
    multirun in every rank and cannot work in a notebook. Here rank 0 stays in the calling process
    and the others are persistent worker processes that receive the pickled trainer. They serve
    later `fit`, `validate`, `test` and `predict` calls, of this trainer and of others, without
    being started again. On all ranks, ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` are set for the
    length of a call; nothing stays behind in `os.environ`.

    Where the ranks come from outside (``torchrun``, SLURM or any other cluster environment, or
    ``LOCAL_RANK`` set by hand) it behaves as Lightning's own.

    Registered as ``"mgpu_ddp"``.

    Args:
        *args: As Lightning's `DDPStrategy`.
        hang_timeout_s: Seconds that a rank may keep another one waiting in a collective, before the
            run ends with an error that says where both are. Default: a little less than `timeout`
            (30 minutes), after which the collective fails anyway. Waits that cannot end are told of
            within seconds. Without effect where the ranks come from outside.
        detect_divergence: Compare the ranks' parameters by hash each time after so many optimizer
            steps, and end the run where they differ; default: never. Buffers are left out: each
            rank has its own until rank 0's are sent to all in the next forward pass.
        max_failures: How often `fit` may lose a rank's process, as to the kernel when memory runs
            out, and go on with new ones; default: never. It goes on from the last snapshot, with
            the same bits as if nothing had been (see `ExactResume`). Rank 0 is the program itself.
        snapshot_every_n_steps: Optimizer steps between two snapshots, in memory if there is room
            (default 100).
        **kwargs: As Lightning's `DDPStrategy`, and through it
            `torch.nn.parallel.DistributedDataParallel`. `start_method` must stay ``"popen"``.

    Raises:
        MisconfigurationException: `num_nodes` is more than 1 and nothing outside starts the ranks.
        ValueError: `start_method` is given, or `hang_timeout_s` or `detect_divergence` is not
            positive.
    """

    strategy_name = "mgpu_ddp"
    hang_timeout_s: float | None = None
    recovery: Recovery | None = None
    """What goes on when a rank's process is lost; `None`: nobody does."""

    def __init__(
        self,
        *args: Any,
        hang_timeout_s: float | None = None,
        max_failures: int = 0,
        snapshot_every_n_steps: int = 100,
        **kwargs: Any,
    ) -> None:
        if hang_timeout_s is not None and not hang_timeout_s > 0:
            raise ValueError(
                f"`{type(self).__name__}(hang_timeout_s={hang_timeout_s!r})`: give seconds, more"
                " than 0, or leave it out for a little less than `timeout`."
            )
        for name, value, least in (
            ("max_failures", max_failures, 0),
            ("snapshot_every_n_steps", snapshot_every_n_steps, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{type(self).__name__}({name}={value!r})`: give a number from {least} on."
                )
        super().__init__(*args, **kwargs)
        self.hang_timeout_s = hang_timeout_s
        if max_failures:
            self.recovery = Recovery(max_failures, snapshot_every_n_steps)

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """The pool's environment, unless something outside starts the ranks."""
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        if type(environment) is LightningEnvironment and (
            # Within a launch of ours the variables are set, and nobody else started this process.
            not environment.creates_processes_externally or come_from_a_launch()
        ):
            environment = PoolEnvironment()
        self._cluster_environment = environment

    @override
    def _configure_launcher(self) -> None:
        if not isinstance(self.cluster_environment, PoolEnvironment):
            super()._configure_launcher()
            return
        if self._start_method != "popen":
            raise ValueError(
                f"`{type(self).__name__}(start_method={self._start_method!r})`: this strategy"
                " has its own launcher. Remove `start_method`, or use Lightning's"
                " `strategy='ddp_spawn'`."
            )
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"`Trainer(num_nodes={self.num_nodes})`: this process can start ranks on its own"
                " machine only. Start one process per device on every node from outside, for"
                f" example `torchrun --nnodes {self.num_nodes} --nproc-per-node"
                f" {self.num_processes} ...` or SLURM's `srun`."
            )
        self._launcher = PoolLauncher(self, self.devices_of)

    def devices_of(self, local_rank: int) -> list[torch.device]:
        """The devices of one of the processes on this node."""
        assert self.parallel_devices is not None
        return [self.parallel_devices[local_rank]]

    @property
    def bound_device(self) -> torch.device | None:
        """The device whose tensors this rank exchanges; `None` if there are several."""
        return self.root_device if is_accelerator(self.root_device) else None

    @override
    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        environment, timeout = self.cluster_environment, self._timeout or default_pg_timeout
        backend, device = self._process_group_backend, self.bound_device
        if isinstance(environment, PoolEnvironment):
            assert environment.rank is not None
            environment.rank.join_group(backend, timeout, device_id=device)
        else:
            assert environment is not None
            _init_dist_connection(environment, backend, timeout=timeout, device_id=device)
            _leave_group_at_exit()

    @override
    def teardown(self) -> None:
        if self.lightning_module is not None:
            _restore_forward(self.lightning_module)
        super().teardown()

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if isinstance(self.cluster_environment, PoolEnvironment):
            process_loader(self, dataloader)
        return dataloader


@functools.cache
def _leave_group_at_exit() -> None:
    """Destroy the group before the interpreter goes.

    Lightning does so for NCCL only. Gloo's threads may otherwise outlive what they use, and a rank
    that has done its work ends with an error.
    """
    atexit.register(leave_group)


def _restore_forward(model: torch.nn.Module) -> None:
    """Remove the wrapper that Lightning sets in place of `forward` during a call of DDP's.

    It stays where that call fails early, and then nothing that refers to the model can be pickled.
    """
    if getattr(vars(model).get("forward"), "__name__", "") == "wrapped_forward":
        del vars(model)["forward"]
