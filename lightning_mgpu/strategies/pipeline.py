"""Pipeline parallelism in one process: one model in stages, each with a device and a thread."""

import torch
from typing_extensions import override

from lightning_mgpu.strategies.base.single_process import SingleProcessStrategy
from lightning_mgpu.strategies.stages.pipelined import PipelineMixin

__all__ = ["PipelineStrategy"]


class PipelineStrategy(PipelineMixin, SingleProcessStrategy):
    """Train one model that is cut into stages on the devices of this process.

    The batch is split into micro-batches that stream through the stages (GPipe, Huang et al.,
    2019). The LightningModule is unchanged: only the `forward` of one submodule is computed in
    stages, and ``training_step`` sees its output for the whole batch, as on one device. Checkpoints
    have plain keys. On the CPU, ``devices=2`` means two threads.

    Registered as ``"pipeline"``.

    Args:
        accelerator: As Lightning's strategies.
        parallel_devices: The devices; default: the Trainer's.
        cluster_environment: As Lightning's strategies; only one process is allowed.
        checkpoint_io: As Lightning's strategies.
        precision_plugin: As Lightning's strategies.
        module: Name of the submodule to cut, ``""`` for the LightningModule itself; default: the
            child with most parameters.
        split_at: Names of the submodules at which the second and later stages begin, as in
            ``named_modules()`` of the LightningModule, or of `module`.
        balance: Without `split_at`: layers in each stage, or what stages are to have about as much
            of: ``"parameters"`` (bytes of them, default), ``"time"`` or ``"memory"``, which are
            measured on the first batch, or ``"auto"``: the cut with the shortest step, as simulated
            from measured times. Measured times vary, and with them the cut.
        chunks: Micro-batches; default: 4 for each device. ``"auto"`` tries 1, 2, 4 and 8 for each
            device on the first batches, three times each, and keeps the fastest; where stages are
            chosen by simulation, so are these.
        stages_per_device: Stages on each device (default 1): with `s` devices stage `k` lies on
            device `k % s`. More stages make devices wait less for the first micro-batch, and hand
            over more often. ``"auto"`` simulates a step with 1 to 4 from times measured on the
            first batch, and takes the quickest, with ``balance="auto"`` unless `balance` is given.
        defer_weight_gradients: Whether devices compute gradients of weights when they have nothing
            else to do, so that the others get gradients of inputs sooner. Done for matrix products
            and convolutions; with ``"auto"`` (default) for those that are large enough.
        checkpoint: Which micro-batches keep only the inputs of units (submodules that lie with one
            stage), which are computed again in backward: ``"never"`` (default), ``"except_last"``
            or ``"always"``; a list has one of them for each stage.
        memory: What each device has for the model, as ``"8GB"`` or in bytes (default: enough). What
            is computed again beside what `checkpoint` says is chosen so that it fits, and if they
            are not given the cut (``balance="auto"``) and `chunks`, with the shortest step as
            simulated. A plan that does not fit is refused.
        split_args: Parameters of the submodule's `forward`, by name or position, whose tensors have
            an entry per sample. Needed where that is not certain. A mapping gives the dimension of
            the batch, too, as ``{"src": 1}`` for tensors of shape (time, batch, features).
        broadcast_args: Parameters whose tensors go to every micro-batch whole.
        deferred_batch_norm: Whether running statistics of batch normalisation are updated once,
            with those of the whole batch (default), or with each micro-batch. Normalisation itself
            is done micro-batch by micro-batch.
        parity_check: What to do if a few samples of the first batch give other results in two
            micro-batches than in one, or if `forward` leaves attributes with a gradient behind:
            ``"error"``, ``"warn"``, or ``"off"`` to compare nothing. Done for each kind of call, in
            training and in evaluation.
        trace_dir: A directory for a timeline of one training step (the fourth, or the last of a
            shorter run), as measured: a trace for ui.perfetto.dev, a PNG and an HTML picture.

    Raises:
        ValueError: An argument is none of its choices.
        MisconfigurationException: More than one node or process.
    """

    strategy_name = "pipeline"

    @property
    @override
    def own_devices(self) -> list[torch.device]:
        return self.devices
