"""Bytes of parameters with their gradients and what the optimizer keeps."""

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mgpu.engine.batch import leaves
from lightning_mgpu.engine.pipeline.partition.memory import Weight

# Two moments, as of Adam, where an optimizer cannot be tried.
_USUAL = 2.0
# Entries of the tensor that an optimizer is tried on.
_SIDE = 32


class WeightMemory:
    """Bytes of modules' parameters and buffers while they are trained.

    Args:
        optimizers: Of the run.
        gradients: How many tensors as large as a parameter its gradient takes.
    """

    def __init__(self, optimizers: Iterable[Optimizer], gradients: int) -> None:
        self._gradients = gradients
        self._state: dict[int, float] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                share = None
                for parameter in group["params"]:
                    kept = _kept(optimizer, parameter)
                    if not kept:
                        share = _tried(optimizer, parameter.dtype) if share is None else share
                        kept = share * parameter.nbytes
                    self._state[id(parameter)] = self._state.get(id(parameter), 0.0) + kept

    def of(self, module: nn.Module) -> dict[int, Weight]:
        """The bytes of each parameter and buffer, by its `id`."""
        return {id(tensor): self._weight(tensor) for tensor in _tensors(module)}

    def besides(self, module: nn.Module, inside: nn.Module) -> float:
        """The bytes of what a module has and a submodule has not."""
        own = self.of(inside)
        return sum(weight.whole for key, weight in self.of(module).items() if key not in own)

    def _weight(self, tensor: Tensor) -> Weight:
        gradients = self._gradients if tensor.requires_grad else 0
        whole = (1 + gradients) * tensor.nbytes + self._state.get(id(tensor), 0.0)
        return Weight(tensor.nbytes, round(whole))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _kept(optimizer: Optimizer, parameter: Tensor) -> float:
    """Bytes that an optimizer has for a parameter already."""
    state = optimizer.state.get(parameter, {})
    return float(sum(leaf.nbytes for _, leaf in leaves(state) if isinstance(leaf, Tensor)))


def _tried(optimizer: Optimizer, dtype: torch.dtype) -> float:
    """What an optimizer keeps of a parameter, as a multiple of it: found out with a small one."""
    parameter = nn.Parameter(torch.ones(_SIDE, _SIDE, dtype=dtype))
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    try:
        trial = kind([parameter], **options)
        parameter.grad = torch.ones_like(parameter)
        trial.step()
    except Exception:  # whatever somebody's own optimizer wants
        return _USUAL
    # Counters and the like are as large for a large parameter.
    return sum(
        leaf.nbytes / parameter.nbytes
        for _, leaf in leaves(dict(trial.state.get(parameter, {})))
        if isinstance(leaf, Tensor) and leaf.numel() > 1
    )
