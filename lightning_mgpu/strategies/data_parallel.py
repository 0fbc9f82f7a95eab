"""Data parallelism in one process: a replica of the model per device, each on its own thread."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_mgpu._compat.lightning import (
    Accelerator,
    CheckpointIO,
    ClusterEnvironment,
    Precision,
)
from lightning_mgpu.engine import batch_norm as engine_batch_norm
from lightning_mgpu.engine.batch import Shard
from lightning_mgpu.engine.data_parallel.loss import joint_loss
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.randomness import RandomStreams, Stream
from lightning_mgpu.engine.workers import Workers
from lightning_mgpu.strategies.base.loader_hint import loader_hint
from lightning_mgpu.strategies.base.single_process import (
    OWN_ATTRIBUTES,
    SHARED_OBJECTS,
    SingleProcessStrategy,
)
from lightning_mgpu.strategies.replicas.manual import ManualOptimization
from lightning_mgpu.strategies.replicas.metrics import is_metric, replica_of
from lightning_mgpu.strategies.replicas.parity import ParityCheck
from lightning_mgpu.strategies.replicas.replica_step import Step
from lightning_mgpu.strategies.replicas.sharding import Sharding

__all__ = ["DataParallelStrategy"]


class DataParallelStrategy(SingleProcessStrategy):
    """Train on several devices of one process: a replica per device, each with part of the batch.

    What Lightning's ``dp`` was until 2.0: nothing is pickled and no port is opened, so it works in
    notebooks, in debuggers and with any model and data. ``training_step`` runs once per replica on
    its shard; the loss is the mean of theirs, weighted by shard size; one optimizer steps the
    master, which is your LightningModule. On the CPU, ``devices=2`` means two threads.

    Registered as ``"dp"``.

    Args:
        accelerator: As Lightning's strategies.
        parallel_devices: The devices, the first of which holds the master; default: the Trainer's.
        cluster_environment: As Lightning's strategies; only one process is allowed.
        checkpoint_io: As Lightning's strategies.
        precision_plugin: As Lightning's strategies.
        batch_norm: Running statistics of batch normalisation: ``"merge"`` (default), those of the
            whole batch, or ``"first"``, those of the first shard. Normalisation itself is done
            shard by shard.
        scatter_fn: Splits a batch that cannot be split along the first dimension of all its
            tensors: ``scatter_fn(batch, n)`` returns at most `n` shards, as `Shard(batch, size)`
            with the number of samples in each.
        gather_fn: Puts the outputs of a step together where tensors do not join along their first
            dimension: ``gather_fn(outputs, sizes)``. Does not see the loss of ``training_step``.
        parity_check: Whether to compute the first batch of each kind of step both whole and in
            shards, without lasting effects, and what to do where the results differ: ``"warn"``
            (default), ``"error"``, which raises `ParityError` before weights change, or ``"off"``.

    Raises:
        ValueError: `batch_norm` or `parity_check` is none of its choices.
        MisconfigurationException: More than one node or process.
    """

    strategy_name = "dp"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        *,
        batch_norm: Literal["merge", "first"] = "merge",
        scatter_fn: Callable[[Any, int], Sequence[Shard]] | None = None,
        gather_fn: Callable[[Sequence[Any], Sequence[int]], Any] | None = None,
        parity_check: Literal["warn", "error", "off"] = "warn",
    ) -> None:
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        if batch_norm not in ("merge", "first"):
            raise ValueError(
                f"`DataParallelStrategy(batch_norm={batch_norm!r})`: use 'merge' (running"
                " statistics of the whole batch) or 'first' (of the first shard)."
            )
        if parity_check not in ("warn", "error", "off"):
            raise ValueError(
                f"`DataParallelStrategy(parity_check={parity_check!r})`: use 'warn', 'error', or"
                " 'off' (no comparison of the first batch with its shards)."
            )
        self._batch_norm: engine_batch_norm.Statistics = batch_norm
        self._scatter_fn = scatter_fn
        self._gather_fn = gather_fn
        self._dataloader_idx = 0
        self._replicas: Replicas | None = None
        self._workers: Workers | None = None
        self._streams = RandomStreams()
        self._parity = ParityCheck(parity_check)
        # By step and DataLoader.
        self._shardings: dict[tuple[str, int], Sharding] = {}

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def on_train_start(self) -> None:
        if self._replicas is not None:  # since the sanity check, hooks may have added to the model
            self._replicas.rebuild()

    @override
    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Return the batch unchanged: each replica moves its own shard in its step."""
        self._dataloader_idx = dataloader_idx
        return batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._step("training_step", *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._step("validation_step", *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._step("test_step", *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._step("predict_step", *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Replicas and threads are made anew by the first step.
        return {
            **self.__dict__,
            "_replicas": None,
            "_workers": None,
            "_shardings": {},
        }

    @override
    def _release(self) -> None:
        if self._replicas is not None:
            self._replicas.finish()
        if self._workers is not None:
            self._streams.finish()
            self._workers.close()
        self._replicas = self._workers = None
        self._shardings = {}

    def _prepared(self) -> tuple[Replicas, Workers]:
        """The replicas and their threads, made when first needed."""
        if self._replicas is None or self._workers is None:
            assert self.lightning_module is not None
            self._replicas = Replicas(
                self.lightning_module,
                self.devices,
                statistics=self._batch_norm,
                is_unit=is_metric,
                copy_unit=replica_of,
                is_opaque=lambda value: isinstance(value, SHARED_OBJECTS),
                own_attributes=OWN_ATTRIBUTES,
            )
            self._workers = Workers(self.devices)
            self._streams = RandomStreams(self.devices)
            self._streams.restart()
        return self._replicas, self._workers

    @override
    def random_streams(self) -> RandomStreams:
        self._prepared()
        return self._streams

    @override
    def copies(self) -> list[nn.Module]:
        return [] if self._replicas is None else self._replicas.copies

    def _step(self, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the LightningModule on every replica and join the outputs."""
        model = self.lightning_module
        assert model is not None
        replicas, workers = self._prepared()
        training = name == "training_step"
        sharding = self._sharding(name)
        # Batch normalisation cannot be trained on a single sample.
        shards = sharding.scatter(batch, 2 if training and self._trains_batch_norm() else 1)
        step = Step(name, shards, args, kwargs, self._dataloader_idx, replicas.devices)
        self._parity.before(step, batch, sharding, replicas, workers)
        with self._streams.step(name, len(shards)) as streams:
            manual = self._manual(step, streams) if training else None
            outputs = step.run(model, replicas, workers, streams, manual, sharding.batch_sizes)
        if not training or manual is not None:
            return sharding.gather(outputs, step.sizes)
        losses = [_loss_of(output) for output in outputs]
        loss = joint_loss(losses, step.sizes, streams, replicas, workers, step.describe)
        self._parity.after(step, losses, loss)
        return _training_output(sharding, outputs, step.sizes, loss)

    def _sharding(self, name: str) -> Sharding:
        """Splitter of the current DataLoader's batches for a kind of step."""
        key = name, self._dataloader_idx
        if key not in self._shardings:
            model = self.lightning_module
            assert model is not None
            self._shardings[key] = Sharding(
                self.devices,
                lambda: loader_hint(model.trainer, name),
                self._scatter_fn,
                self._gather_fn,
            )
        return self._shardings[key]

    def _manual(self, step: Step, streams: Sequence[Stream]) -> ManualOptimization | None:
        model = self.lightning_module
        assert model is not None
        if model.automatic_optimization:
            return None
        replicas, workers = self._prepared()

        def joint(losses: list[Tensor]) -> Tensor:
            loss = joint_loss(losses, step.sizes, streams, replicas, workers, step.describe)
            assert loss is not None
            return loss

        def run_closures(closures: list[Callable[[], Any]]) -> list[Any]:
            with replicas.as_inside(len(step.sizes)):
                outside = partial(replicas.as_outside, len(step.sizes))
                return workers.run(closures, outside)

        return ManualOptimization(model, step.sizes, joint, run_closures)

    def _trains_batch_norm(self) -> bool:
        assert self.lightning_module is not None
        layers = engine_batch_norm.layers_of(self.lightning_module.modules())
        return any(layer.training for layer in layers)


def _training_output(
    sharding: Sharding, outputs: Sequence[Any], sizes: Sequence[int], loss: Tensor | None
) -> Any:
    if loss is None:
        return None
    mappings = [(o, s) for o, s in zip(outputs, sizes, strict=True) if isinstance(o, Mapping)]
    if not mappings:
        return loss
    others = [{key: o[key] for key in o if key != "loss"} for o, _ in mappings]
    return {"loss": loss, **sharding.gather(others, [size for _, size in mappings])}


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"`training_step` must return a scalar loss; its shape is {tuple(loss.shape)}. Take its"
            " mean over the samples."
        )
    if loss is None or isinstance(loss, Tensor):
        return loss
    raise TypeError(
        f"`training_step` must return a tensor, a dict with a tensor under 'loss', or None; it"
        f" returned {type(output).__name__}."
    )
