"""The loss of a batch from the losses of its shards, as one tensor to call `backward` on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_mgpu.engine.autograd import Gradients, graft
from lightning_mgpu.engine.batch import weighted_mean
from lightning_mgpu.engine.data_parallel.error_hints import hinted
from lightning_mgpu.engine.data_parallel.replicas import Replicas
from lightning_mgpu.engine.error_notes import noted
from lightning_mgpu.engine.randomness import Stream
from lightning_mgpu.engine.workers import Workers


def joint_loss(
    losses: Sequence[Tensor | None],
    sizes: Sequence[int],
    streams: Sequence[Stream],
    replicas: Replicas,
    workers: Workers,
    describe: Callable[[int], str],
) -> Tensor | None:
    """The mean of the shards' losses, weighted by size.

    Its backward runs those of the shards side by side, each on the worker that computed it, and
    hands each of the master's parameters one gradient, their sum.

    Args:
        losses: One per slot, scalar; `None` where a shard has none, and weighs nothing then.
        sizes: Samples in each shard.
        streams: The slots' random numbers, for what backward computes again.
        replicas: Where the losses were computed.
        workers: Who computed them.
        describe: A slot in words, noted on errors in its backward.

    Returns:
        The loss, on the master's device; `None` if no shard has one.
    """
    having = [(slot, loss) for slot, loss in enumerate(losses) if loss is not None]
    if not having:
        return None
    weights = [float(sizes[slot]) for slot, _ in having]
    total = sum(weights) or 1.0
    value = weighted_mean([loss.detach().to(having[0][1].device) for _, loss in having], weights)
    if not any(loss.requires_grad for _, loss in having):
        return value
    by_slot = {slot: (loss, w / total) for (slot, loss), w in zip(having, weights, strict=True)}

    def backward_of(slot: int, gradient: Tensor, keep: bool) -> Callable[[], None]:
        def run() -> None:
            if slot in by_slot and by_slot[slot][0].requires_grad:
                loss, weight = by_slot[slot]
                where = noted(describe(slot) + ", in backward")
                with where, hinted(len(losses)), streams[slot].entered():
                    seed = (gradient.to(loss.device, loss.dtype) * weight).reshape(loss.shape)
                    torch.autograd.backward(loss, seed, retain_graph=keep)

        return run

    def backward(gradients: Gradients, keep: bool) -> Gradients:
        gradient = gradients[0]
        if gradient is None:
            return [None] * len(replicas.parameters)
        with replicas.backward(len(losses)):
            workers.run([backward_of(slot, gradient, keep) for slot in range(len(losses))])
        return replicas.take_gradients(workers, len(losses))

    return graft([value], replicas.parameters, backward)[0]
