"""One step of a LightningModule, on one shard per replica."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_mgpu.engine.batch import Shard, leaves, map_leaves
from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import untracked
from lightning_mgpu.engine.data_parallel.error_hints import hinted
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.error_notes import noted
from lightning_mgpu.engine.randomness import Stream
from lightning_mgpu.engine.versions import own_version
from lightning_mgpu.engine.workers import Workers
from lightning_mgpu.strategies.replicas.log_merging import BatchSizes, LogRecorder, means_of, replay
from lightning_mgpu.strategies.replicas.manual import ManualOptimization
from lightning_mgpu.strategies.replicas.metrics import ReplicaMetrics


class Step:
    """A step of the LightningModule, with its arguments.

    Args:
        name: Of the method: ``training_step`` and the like.
        shards: One per replica that takes part.
        args: What the method gets behind the batch.
        kwargs: The same, by name.
        dataloader_idx: For the hooks that transfer a batch.
        devices: Of the replicas.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dataloader_idx: int,
        devices: Sequence[torch.device],
    ) -> None:
        self.name = name
        self.sizes = [shard.size for shard in shards]
        self.shards = list(shards)
        self._args, self._kwargs = args, kwargs
        self.dataloader_idx = dataloader_idx
        self._devices = devices

    def run(
        self,
        model: LightningModule,
        replicas: Replicas,
        workers: Workers,
        streams: Sequence[Stream],
        manual: ManualOptimization | None,
        batch_sizes: BatchSizes,
    ) -> list[Any]:
        """Run the step, and merge the replicas' logs and metrics into the master.

        Args:
            model: The master.
            replicas: The master and its copies.
            workers: Who runs them.
            streams: The random numbers of each.
            manual: For manual optimisation.
            batch_sizes: What earlier steps have logged as `batch_size`.

        Returns:
            What the replicas returned.
        """
        count = len(self.shards)
        recorders = [LogRecorder() for _ in range(count)]
        overrides = [
            {"log": recorder.log, **(manual.overrides(slot) if manual is not None else {})}
            for slot, recorder in enumerate(recorders)
        ]
        outside = partial(replicas.as_outside, count) if manual is not None else nullcontext
        samples = [_samples(shard) for shard in self.shards]
        with replicas.step(count, overrides, samples, self.sizes, self.name) as modules:
            metrics = ReplicaMetrics(replicas.units, [replicas.units_of(i) for i in range(count)])
            metrics.begin()
            tasks = [
                partial(self._run_one, slot, module, streams[slot], replicas)
                for slot, module in enumerate(modules)
            ]
            outputs = workers.run(tasks, outside)
            replicas.refer_to(partial(means_of, outputs, recorders))
        metrics.merge(self.sizes)
        replay(recorders, self.sizes, model.log, metrics.original, batch_sizes)
        return outputs

    def of(self, shards: Sequence[Shard]) -> "Step":
        """Return the same step for other shards."""
        return Step(self.name, shards, self._args, self._kwargs, self.dataloader_idx, self._devices)

    def describe(self, slot: int) -> str:
        """Describe a replica and its shard for a message."""
        first = sum(self.sizes[:slot])
        last = first + self.sizes[slot] - 1
        return (
            f"replica {slot} of {len(self.sizes)} on {self._devices[slot]},"
            f" samples {first} to {last} of the batch"
        )

    def _run_one(self, slot: int, module: Any, stream: Stream, replicas: Replicas) -> Any:
        where = noted(self.describe(slot))
        with where, hinted(len(self.shards)), stream.entered(), replicas.watching(slot):
            batch = self.shards[slot].batch
            if len(self.shards) > 1:
                batch = map_leaves(own_version, batch)
            return untracked(self.call(module, batch, self._devices[slot]))

    def call(self, module: Any, batch: Any, device: torch.device) -> Any:
        """Run the step of one module on a batch, moved to its device first."""
        batch = self._transferred(module, batch, device)
        return getattr(module, self.name)(batch, *self._args, **self._kwargs)

    def _transferred(self, module: Any, batch: Any, device: torch.device) -> Any:
        """Move the shard to its device through the LightningModule's hooks.

        Lightning's own way to call hooks keeps state in the Trainer, and threads would mix it up.
        """
        selector = module.trainer._data_connector._datahook_selector
        for hook, arguments in (
            ("transfer_batch_to_device", (device, self.dataloader_idx)),
            ("on_after_batch_transfer", (self.dataloader_idx,)),
        ):
            owner = selector.get_instance(hook)
            owner = module if isinstance(owner, LightningModule) else owner
            batch = getattr(owner, hook)(batch, *arguments)
        return batch


def _samples(shard: Shard) -> int:
    """Number of samples of a shard, whatever its weight."""
    for _, leaf in leaves(shard.batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return len(leaf)
    return shard.size
