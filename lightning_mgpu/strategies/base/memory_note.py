"""What is said of a run that has ended for lack of memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mgpu._compat.lightning import LightningModule, Strategy
from lightning_mgpu._compat.lightning_messages import says_out_of_memory
from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.device import memory_of
from lightning_mgpu.format import readable_bytes

# From which share of a device on the model itself is what is too large.
_LARGE = 0.6


@dataclass
class Held:
    """Bytes on a device that do not depend on the batch."""

    weights: int = 0
    gradients: int = 0
    state: int = 0

    def __str__(self) -> str:
        return (
            f"weights {readable_bytes(self.weights)}, their gradients"
            f" {readable_bytes(self.gradients)}, optimizer state {readable_bytes(self.state)}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or says_out_of_memory(error)


def memory_note(
    strategy: Strategy,
    copies: Iterable[torch.nn.Module],
    for_batch: list[str],
    for_model: list[str],
) -> str | None:
    """What lies on each device, and what would help.

    Args:
        strategy: Of the run.
        copies: Copies of the model that it has.
        for_batch: What to do about activations.
        for_model: What to do about a model that is too large itself.
    """
    model = strategy.lightning_module
    if model is None:
        return None
    held = _held(model, copies, strategy)
    parts, is_large = [], False
    for device, on_device in held.items():
        known = memory_of(device)
        more = ""
        if known is not None:
            most, total = known
            more = f"; {readable_bytes(most)} at most in use at once, of {readable_bytes(total)}"
            known_bytes = on_device.weights + on_device.gradients + on_device.state
            is_large = is_large or known_bytes > _LARGE * total
        parts.append(f"{device}: {on_device}{more}")
    help_ = for_model if is_large else for_batch
    rank = ", of rank 0" if strategy.launcher is not None else ""
    return (
        f"(By device{rank}: {'. '.join(parts)}. What is left is for activations, which grow with"
        f" the batch. Most likely to help: {'; '.join(help_)}.)"
    )


def _held(
    model: LightningModule, copies: Iterable[torch.nn.Module], strategy: Strategy
) -> dict[torch.device, Held]:
    found: dict[torch.device, Held] = {}
    seen: set[tuple[torch.device, int]] = set()
    for tensor in _tensors([model, *copies]):
        key = tensor.device, tensor.data_ptr()
        if key in seen:
            continue  # replicas on one device share them
        seen.add(key)
        held = found.setdefault(tensor.device, Held())
        held.weights += tensor.nbytes
        held.gradients += tensor.nbytes if tensor.requires_grad else 0
    for optimizer in strategy.optimizers:
        for state in optimizer.state.values():
            for _, leaf in leaves(state):
                if isinstance(leaf, Tensor):
                    found.setdefault(leaf.device, Held()).state += leaf.nbytes
    return found


def _tensors(modules: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
