"""Choose a pipeline's stages by simulation, once for a strategy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn

from lightning_mgpu._compat.lightning import TrainerFn
from lightning_mgpu.engine.pipeline.hand_over import hand_over_seconds
from lightning_mgpu.engine.pipeline.partition.choice import PartitionError
from lightning_mgpu.engine.pipeline.partition.memory import MemoryLimit
from lightning_mgpu.engine.pipeline.partition.stage_planner import NUMBERS, Chosen, StagePlanner
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint
from lightning_mgpu.engine.pipeline.runtime.chunks_autotuner import Chunks
from lightning_mgpu.engine.pipeline.runtime.deferral import Defer, Deferral
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy
from lightning_mgpu.strategies.stages.weight_memory import WeightMemory


@dataclass(kw_only=True)
class Planning:
    """Options by which stages are chosen, and what has been chosen.

    Args:
        stages_per_device: How many stages lie on each device; `None`: to be chosen.
        free: Whether stages may begin anywhere.
        chunks: Micro-batches, ``"auto"``, or `None` for the usual number.
        defer: Which gradients of weights come later.
        checkpoint: Which micro-batches are computed again at least.
        memory: Bytes of each device; `None`: enough.
    """

    stages_per_device: int | None
    free: bool
    chunks: int | Literal["auto"] | None
    defer: Defer
    checkpoint: Checkpoint | Sequence[Checkpoint]
    memory: float | None
    _chosen: dict[tuple[str, int], Chosen] = field(default_factory=dict)

    def known(self, module: nn.Module, devices: int) -> Chosen | None:
        """What an earlier run of such a module has chosen."""
        return self._chosen.get(_kind(module, devices))

    def micro_batches(self, module: nn.Module, devices: int) -> Chunks:
        """The number of micro-batches, or how it is found."""
        if isinstance(self.chunks, int):
            return Chunks(devices, self.chunks)
        known = self.known(module, devices)
        if known is not None:
            return Chunks(devices, known.best.chunks)
        is_open = self.chunks == "auto" or self.memory is not None
        return Chunks(devices, None if is_open else 4 * devices)

    def planner(
        self,
        strategy: MultiDeviceStrategy,
        module: nn.Module,
        devices: Sequence[torch.device],
        threads: int | None,
        *,
        is_given: bool,
    ) -> StagePlanner | None:
        """What chooses the stages; `None` if they need not be simulated.

        Args:
            strategy: The strategy.
            module: What is cut.
            devices: The process's devices.
            threads: Intra-op threads of each.
            is_given: Whether the user has made the stages.

        Raises:
            PartitionError: The stages are given, and their memory is limited.
        """
        if self.memory is not None and is_given:
            raise PartitionError(
                f"`{type(strategy).__name__}(memory=...)` chooses which layers are computed again,"
                " and those of `configure_pipeline` are not measured. Say it yourself, as"
                " `checkpoint=['always', 'never']`, or let the strategy cut the module."
            )
        model = strategy.lightning_module

        def is_fitting() -> bool:
            """In evaluation nothing is kept, and processes do without each other."""
            assert model is not None
            return model.trainer.state.fn == TrainerFn.FITTING

        limited = self.memory is not None and is_fitting()
        if self.stages_per_device is not None and not self.free and not limited:
            return None
        numbers = [1] if len(devices) == 1 else NUMBERS  # of which none waits for another

        def share(chosen: Chosen) -> Chosen:
            """Take what the first process has chosen, in this run and in later ones."""
            if is_fitting():
                chosen = strategy.broadcast(chosen)
                self._chosen[_kind(module, len(devices))] = chosen
            return chosen

        return StagePlanner(
            devices=len(devices),
            numbers=numbers if self.stages_per_device is None else [self.stages_per_device],
            hand_over=partial(hand_over_seconds, devices, threads),
            free=self.free,
            least=Deferral(self.defer, devices).least(None),
            checkpoint=self.checkpoint,
            memory=partial(self._limit, strategy, module) if limited else None,
            share=share,
        )

    def _limit(self, strategy: MultiDeviceStrategy, module: nn.Module) -> MemoryLimit:
        """Memory of each device, and what is in it already."""
        model = strategy.lightning_module
        assert model is not None
        assert self.memory is not None
        # A step's sum beside that of the steps before, and another where processes exchange them.
        several = model.trainer.accumulate_grad_batches > 1
        weights = WeightMemory(strategy.optimizers, 1 + several + (strategy.world_size > 1))
        return MemoryLimit(
            self.memory,
            lambda name: weights.of(module.get_submodule(name)),
            weights.besides(model, module),
        )


def _kind(module: nn.Module, devices: int) -> tuple[str, int]:
    return type(module).__qualname__, devices
