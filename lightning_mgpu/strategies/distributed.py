"""Distributed data parallel: a process per device, launched by our own worker pool."""

import atexit
import functools
import logging
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy as _LightningDDPStrategy
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_mgpu.launch.rank import leave_group
from lightning_mgpu.launch.variables import come_from_a_launch
from lightning_mgpu.strategies.environment import PoolEnvironment
from lightning_mgpu.strategies.launcher import PoolLauncher
from lightning_mgpu.strategies.rank_data import process_loader
from lightning_mgpu.strategies.reduced import (
    Reduced,
    as_trainable,
    forget_buckets,
    kept_buffers,
    release,
)

log = logging.getLogger(__name__)


class DDPStrategy(_LightningDDPStrategy):
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
        **kwargs: As Lightning's `DDPStrategy`, and through it
            `torch.nn.parallel.DistributedDataParallel`. `timeout` (default 30 minutes) also
            bounds how long a rank may hang before the run ends with its Python stack.
            `start_method` must stay ``"popen"``.

    Raises:
        MisconfigurationException: `num_nodes` is more than 1 and nothing outside starts the ranks.
        ValueError: `start_method` is given.
    """

    strategy_name = "mgpu_ddp"

    _reduced: Reduced | None = None

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Our pool's, unless something outside starts the ranks."""
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
                f"`{type(self).__name__}(start_method={self._start_method!r})`: this strategy has"
                " a launcher of its own. Leave `start_method` out, or use Lightning's"
                " `strategy='ddp_spawn'`."
            )
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"`Trainer(num_nodes={self.num_nodes})`: this process can start ranks on its own"
                " machine only. Start one process per device on every node from outside, for"
                f" example `torchrun --nnodes {self.num_nodes} --nproc-per-node"
                f" {self.num_processes} ...` or SLURM's `srun`."
            )
        self._launcher = PoolLauncher(self)

    @property
    def bound_device(self) -> torch.device | None:
        """The one device whose tensors this rank exchanges; `None` if there are several."""
        return None if self.root_device.type == "cpu" else self.root_device

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
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self._reduced = Reduced(self.model)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_parameters()
        return super().training_step(*args, **kwargs)

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if self._reduced is not None:
            self._reduced.check_gradients()

    @override
    def teardown(self) -> None:
        self._reduced = None
        if self.lightning_module is not None:
            _restore_forward(self.lightning_module)
        super().teardown()

    def _follow_parameters(self) -> None:
        """Build DDP anew if parameters were unfrozen, frozen or added since it was built.

        It averages the gradients of what was trainable then: ranks would drift apart. Between
        steps no gradient is on its way, and hooks have done the same on all ranks.
        """
        model, module = self.model, self.lightning_module
        if self._reduced is None or not isinstance(model, DistributedDataParallel):
            return
        assert module is not None
        # To leave out what is frozen is needed where DDP waits for every gradient. Manual
        # optimisation freezes parameters for a part of a step only (`toggle_optimizer`).
        may_shrink = module.automatic_optimization and not model.find_unused_parameters
        parameters = self._reduced.outdated(may_shrink)
        if parameters is None:
            return
        log.info("The trainable parameters have changed; DDP is built anew for them.")
        own_buffers = nullcontext() if model.broadcast_buffers else kept_buffers(module)
        forget_buckets(self._ddp_comm_state)
        self._reduced, self._pl_static_graph_delay_done = None, False
        self.model = release(model)
        with as_trainable(parameters), own_buffers:
            self.configure_ddp()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reduced": None}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        if isinstance(self.cluster_environment, PoolEnvironment):
            process_loader(self, dataloader)
        return dataloader

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(
            cls.strategy_name,
            cls,
            description="DDP through a pool of persistent workers; safe under Hydra multirun",
        )


@functools.cache
def _leave_group_at_exit() -> None:
    """Destroy the group before the interpreter goes.

    Lightning does so for NCCL only. Gloo's threads may otherwise outlive what they use, and a rank
    that has done its work ends with an error.
    """
    atexit.register(leave_group)


def _restore_forward(model: torch.nn.Module) -> None:
    """Take away what Lightning puts in the place of `forward` for the time of a call of DDP's.

    It stays where that call fails early, and then nothing that refers to the model can be pickled.
    """
    if getattr(vars(model).get("forward"), "__name__", "") == "wrapped_forward":
        del vars(model)["forward"]
