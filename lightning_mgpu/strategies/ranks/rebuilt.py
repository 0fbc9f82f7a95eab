"""DDP that allows the trainable parameters to change during training."""

import logging
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_mgpu._compat.lightning import DDPStrategy as _LightningDDPStrategy
from lightning_mgpu._compat.lightning_results import synced_names
from lightning_mgpu._compat.torch_modules import ignored_by_ddp
from lightning_mgpu.strategies.base.belonging import Belonging
from lightning_mgpu.strategies.ranks.divergence import DivergenceCheck, compare_structure
from lightning_mgpu.strategies.ranks.reduced import (
    Reduced,
    as_trainable,
    forget_buckets,
    kept_buffers,
    release,
)

log = logging.getLogger(__name__)


class RebuiltDDPStrategy(Belonging, _LightningDDPStrategy):
    """Lightning's DDP, rebuilt when parameters are unfrozen, frozen or added.

    Args:
        *args: As Lightning's `DDPStrategy`.
        detect_divergence: Compare the ranks' parameters, and names of what they log, each time
            after so many optimizer steps; default: never.
        **kwargs: As Lightning's `DDPStrategy`.

    Raises:
        ValueError: `detect_divergence` is no positive number.
    """

    _reduced: Reduced | None = None
    _divergence: DivergenceCheck | None = None

    def __init__(self, *args: Any, detect_divergence: int | None = None, **kwargs: Any) -> None:
        if detect_divergence is not None:
            if not isinstance(detect_divergence, int) or detect_divergence < 1:
                raise ValueError(
                    f"`{type(self).__name__}(detect_divergence={detect_divergence!r})`: give the"
                    " number of optimizer steps between two comparisons, at least 1, or leave it"
                    " out."
                )
            self._divergence = DivergenceCheck(detect_divergence)
        super().__init__(*args, **kwargs)

    @override
    def configure_ddp(self) -> None:
        self._compare_structure()
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self._reduced = Reduced(self.model)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_parameters()
        self._compare_parameters()
        return super().training_step(*args, **kwargs)

    @override
    def on_train_end(self) -> None:
        self._compare_parameters()
        super().on_train_end()

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if self._reduced is not None:
            self._reduced.check_gradients()

    @override
    def teardown(self) -> None:
        self._reduced = None
        super().teardown()

    def _compare_parameters(self) -> None:
        model, module, check = self.model, self.lightning_module, self._divergence
        if check is None or not isinstance(model, DistributedDataParallel) or module is None:
            return
        step = module.trainer.global_step
        if not check.is_due(step):
            return
        ignored = model.parameters_to_ignore
        named = {name: p for name, p in model.module.named_parameters() if name not in ignored}
        check.compare(named, synced_names(module.trainer), step, self.root_device)

    def _compare_structure(self) -> None:
        module, kwargs = self.model, self._ddp_kwargs
        assert module is not None
        if False in (kwargs.get("broadcast_buffers"), kwargs.get("forward_sync_buffers")):
            return  # each rank has its own
        ignored = ignored_by_ddp(module)
        named = chain(module.named_parameters(), module.named_buffers())
        tensors = {name: each for name, each in named if name not in ignored and not is_lazy(each)}
        compare_structure(tensors, self.root_device)

    def _follow_parameters(self) -> None:
        """Rebuild DDP if parameters were unfrozen, frozen or added since it was built.

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
        log.info("The trainable parameters have changed; DDP is rebuilt for them.")
        own_buffers = nullcontext() if model.broadcast_buffers else kept_buffers(module)
        forget_buckets(self._ddp_comm_state)
        self._reduced, self._pl_static_graph_delay_done = None, False
        self.model = release(model)
        with as_trainable(parameters), own_buffers:
            self.configure_ddp()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reduced": None}
