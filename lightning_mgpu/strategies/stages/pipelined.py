"""Mixin for strategies whose processes compute one submodule in stages."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mgpu._compat.lightning import Trainer, TrainerFn
from lightning_mgpu.engine.batch import BatchLayout
from lightning_mgpu.engine.pipeline.check.parity import Parity, ParityCheck
from lightning_mgpu.engine.pipeline.error_hints import hinted
from lightning_mgpu.engine.pipeline.inputs.origin import StepBatch
from lightning_mgpu.engine.pipeline.inputs.splitter import SplitArgs, Splitter
from lightning_mgpu.engine.pipeline.partition.cutter import Balance, Cut, Cutter
from lightning_mgpu.engine.pipeline.pipeline import Pipeline
from lightning_mgpu.engine.pipeline.runtime.checkpointing import Checkpoint
from lightning_mgpu.engine.pipeline.runtime.deferral import Defer
from lightning_mgpu.engine.randomness import RandomStreams
from lightning_mgpu.strategies.base.belonging import LESS_STATE
from lightning_mgpu.strategies.base.loader_hint import loader_hint
from lightning_mgpu.strategies.base.multi_device import MultiDeviceStrategy
from lightning_mgpu.strategies.base.trainer_callbacks import callbacks_of
from lightning_mgpu.strategies.stages.model_summary import StagesInSummary
from lightning_mgpu.strategies.stages.option_checks import (
    check_checkpoint,
    check_choice,
    check_choices,
    check_count_of_checkpoints,
    check_stages_per_device,
    memory_bytes,
)
from lightning_mgpu.strategies.stages.placement import (
    ForwardOverride,
    muted,
    place,
    state_to_parameters,
)
from lightning_mgpu.strategies.stages.planning import Planning
from lightning_mgpu.strategies.stages.split_module import find_module, own_stages
from lightning_mgpu.strategies.stages.stage_table import show_stages
from lightning_mgpu.strategies.stages.step_trace import StepTrace
from lightning_mgpu.strategies.stages.uncalled import Uncalled

_DEFER = (True, False, "auto")
_PARITY_CHECKS = ("error", "warn", "off")


class PipelineMixin(MultiDeviceStrategy):
    """Compute one submodule of the LightningModule in stages on the process's devices.

    To be put before the strategy that makes the processes. The arguments are described by
    `PipelineStrategy`.
    """

    def __init__(
        self,
        *args: Any,
        module: str | None = None,
        split_at: str | Sequence[str] | None = None,
        balance: Sequence[int] | Literal["parameters", "time", "memory", "auto"] | None = None,
        chunks: int | Literal["auto"] | None = None,
        stages_per_device: int | Literal["auto"] = 1,
        defer_weight_gradients: Defer = "auto",
        checkpoint: Checkpoint | Sequence[Checkpoint] = "never",
        memory: str | float | None = None,
        split_args: str | int | Sequence[str | int] | Mapping[str | int, int] | None = (),
        broadcast_args: str | int | Sequence[str | int] | None = (),
        deferred_batch_norm: bool = True,
        parity_check: Literal["error", "warn", "off"] = "error",
        trace_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choices(type(self).__name__, split_at, balance, chunks)
        check_stages_per_device(type(self).__name__, stages_per_device, split_at, balance)
        check_choice(type(self).__name__, "defer_weight_gradients", defer_weight_gradients, _DEFER)
        check_checkpoint(type(self).__name__, checkpoint, stages_per_device)
        check_choice(type(self).__name__, "parity_check", parity_check, _PARITY_CHECKS)
        self._module = module
        self._split_at = [split_at] if isinstance(split_at, str) else split_at
        size = memory_bytes(type(self).__name__, memory)
        planned = stages_per_device == "auto" or size is not None
        usual: Balance = "auto" if planned else "parameters"
        self._balance: Balance = usual if balance is None else balance
        self._stages_per_device: int | None = (
            None if stages_per_device == "auto" else stages_per_device
        )
        self._defer_weight_gradients = defer_weight_gradients
        self._checkpoint: Checkpoint | Sequence[Checkpoint] = _plain(checkpoint)
        self._split_args: SplitArgs = _plain(split_args)
        self._broadcast_args: str | int | Sequence[str | int] | None = _plain(broadcast_args)
        Splitter(self._split_args, self._broadcast_args)  # refuses contradictions
        self._planning = Planning(
            stages_per_device=self._stages_per_device,
            free=self._balance == "auto" and split_at is None,
            chunks=chunks,
            defer=defer_weight_gradients,
            checkpoint=self._checkpoint,
            memory=size,
        )
        self._deferred_batch_norm = deferred_batch_norm
        self._parity_check: ParityCheck = parity_check
        self._trace_dir = None if trace_dir is None else Path(trace_dir)
        self._trace: StepTrace | None = None
        self._pipeline: Pipeline | None = None
        self._override: ForwardOverride | None = None
        self._placed: list[Cut] = []
        self._expected: Cut | None = None
        self._in_summary: StagesInSummary | None = None
        self._step_batch = StepBatch()
        self._layouts: dict[Hashable, BatchLayout] = {}
        self._uncalled: Uncalled | None = None

    @property
    @abstractmethod
    def own_devices(self) -> list[torch.device]:
        """This process's devices."""

    @property
    def stage_devices(self) -> list[torch.device]:
        """The device of each stage."""
        if self._pipeline is not None:
            return self._pipeline.devices
        return self.own_devices * (self._stages_per_device or 1)

    @property
    def threads_per_device(self) -> int | None:
        """Intra-op threads of each device; `None`: its share of the machine's cores."""
        return None

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        state_to_parameters(self.optimizers)
        stages = self._placed[0] if self._placed else self._expected
        if stages is not None:
            self._in_summary = StagesInSummary(callbacks_of(trainer), stages, self.stage_devices)
        if self._trace_dir and trainer.state.fn == TrainerFn.FITTING and self.global_rank == 0:
            assert self._pipeline is not None
            self._trace = StepTrace(self._trace_dir, self._pipeline)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._uncalled is not None:
            self._uncalled.end()
        if self._trace is not None:
            self._trace.write()

    @override
    def model_to_device(self) -> None:
        """Move each stage to its device, and all else to the first."""
        assert self.lightning_module is not None
        self._install()
        assert self._pipeline is not None
        cutter = self._pipeline.cutter
        if cutter.cut is not None:
            self._on_cut(cutter.cut)
            return
        # What it calls is found out at the first call; until then, this is what it likely does.
        self._expected = cutter.expected()
        if self._expected is None:
            self.lightning_module.to(self.root_device)
        else:
            place(self.lightning_module, self._expected, self.stage_devices)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
        state_to_parameters(self.optimizers)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        tracing = self._trace.step() if self._trace else nullcontext()
        watching = self._uncalled.step() if self._uncalled else nullcontext()
        with self._batch_known("training_step", args), tracing, watching:
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        with hinted():
            return super().backward(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._batch_known("validation_step", args):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._batch_known("test_step", args):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._batch_known("predict_step", args):
            return super().predict_step(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Made anew when the Trainer is set up.
        return {
            **super().__getstate__(),
            "_pipeline": None,
            "_override": None,
            "_placed": [],
            "_expected": None,
            "_in_summary": None,
            "_trace": None,
            "_step_batch": StepBatch(),
            "_layouts": {},
            "_uncalled": None,
        }

    @contextmanager
    def _batch_known(self, step: str, args: tuple[Any, ...]) -> Iterator[None]:
        model = self.lightning_module
        assert model is not None
        kind = step, *args[2:]  # with the number of the DataLoader, if there are several
        if kind not in self._layouts:
            trainer = model.trainer
            self._layouts[kind] = BatchLayout(lambda: loader_hint(trainer, step))
        self._step_batch = StepBatch(args[0] if args else None, self._layouts[kind])
        try:
            with hinted():
                yield
        finally:
            self._step_batch = StepBatch()

    def _install(self) -> None:
        """Replace the chosen submodule's `forward` by the pipeline."""
        model, own = self.lightning_module, self.own_devices
        assert model is not None
        devices, threads = own * (self._stages_per_device or 1), self.threads_per_device
        self._layouts = {}
        name, module = find_module(model, self._module)
        made = own_stages(model)
        self._override = ForwardOverride(module)
        split_at = self._split_at
        if split_at is not None:
            split_at = [entry.removeprefix(f"{name}.") if name else entry for entry in split_at]
        check_count_of_checkpoints(type(self).__name__, self._checkpoint, len(devices))
        planner = self._planning.planner(self, module, own, threads, is_given=made is not None)
        self._pipeline = Pipeline(
            Cutter(
                *(module, self._override.plain, len(devices), split_at, self._balance, made),
                *(planner, self._planning.known(module, len(own))),
            ),
            Splitter(self._split_args, self._broadcast_args),
            devices,
            chunks=self._planning.micro_batches(module, len(own)),
            checkpoint=self._checkpoint,
            deferred_batch_norm=self._deferred_batch_norm,
            step_batch=lambda: self._step_batch,
            parity=Parity(
                self._parity_check, type(module).__name__, devices, partial(muted, model)
            ),
            on_cut=self._on_cut,
            threads=threads,
            stages_per_device=self._stages_per_device or 1,
            defer_weight_gradients=self._defer_weight_gradients,
        )
        self._uncalled = Uncalled(model, name, module, self._pipeline)
        self._override.install(self._pipeline)

    def _on_cut(self, cut: Cut) -> None:
        """Place a cut's stages on their devices, if they are not there yet."""
        if any(cut is placed for placed in self._placed):
            return
        assert self.lightning_module is not None
        place(self.lightning_module, cut, self.stage_devices)
        state_to_parameters(self.optimizers)
        if not self._placed:
            assert self._pipeline is not None
            pipeline = self._pipeline
            show_stages(
                cut,
                pipeline.devices,
                pipeline.chunks.usual,
                pipeline.cutter.costs,
                pipeline.checkpoint,
                pipeline.stages_per_device,
                self._defer_weight_gradients is True,
                pipeline.cutter.chosen,
            )
        self._placed.append(cut)

    @override
    def memory_advice(self) -> tuple[list[str], list[str]]:
        chunks = 4 * len(self.own_devices)
        if self._pipeline is not None:
            chunks = self._pipeline.chunks.usual
        return [
            f"more micro-batches, `chunks={2 * chunks}`",
            "`checkpoint='always'`, which computes activations again",
            "stages that take as much memory as each other, `balance='memory'`",
        ], [
            "more devices, and with them stages",
            "stages that take as much memory as each other, `balance='memory'`",
            LESS_STATE,
        ]

    @override
    def random_streams(self) -> RandomStreams:
        assert self._pipeline is not None
        return self._pipeline.streams

    @override
    def _release(self) -> None:
        if self._override is not None:
            self._override.remove()
        if self._pipeline is not None:
            self._pipeline.close()
        if self._in_summary is not None:
            self._in_summary.remove()
        self._pipeline = self._override = self._trace = self._in_summary = self._uncalled = None
        self._placed, self._expected = [], None


def _plain(given: Any) -> Any:
    """Convert containers of a config into plain ones."""
    if given is None or isinstance(given, (str, int)):
        return given
    return dict(given) if isinstance(given, Mapping) else list(given)
