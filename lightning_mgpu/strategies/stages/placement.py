"""Place the parts of a split model on devices, and replace its submodule's `forward`."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mgpu._compat.torch_modules import map_tensors
from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipeline.partition.cutter import Cut


class ForwardOverride:
    """Replacement for a module's `forward` on the instance.

    Copies and pickles of the module have its own method instead.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.plain: Callable[..., Any] = module.forward
        self._had_own = "forward" in vars(module)
        self._call: Callable[..., Any] = module.forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies are made before they have attributes, so that this finds the class's method.
        return getattr, (self.module, "forward")

    def install(self, call: Callable[..., Any]) -> None:
        """Replace `forward` by `call`."""
        self._call = call
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Restore `forward`."""
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]
            if self._had_own:
                vars(self.module)["forward"] = self.plain


def place(model: LightningModule, cut: Cut, devices: Sequence[torch.device]) -> None:
    """Move the tensors of each stage to its device, and all others to the first device.

    Args:
        model: The whole model.
        cut: Its stages.
        devices: One for each stage.
    """
    where: dict[int, torch.device] = {}
    for device, tensors in zip(devices, cut.tensors, strict=True):
        for tensor in tensors.values():
            where[id(tensor)] = device
            if tensor.grad is not None:
                where[id(tensor.grad)] = device

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(where.get(id(tensor), devices[0]))

    map_tensors(model, moved)
    for module in model.modules():
        if isinstance(module, _DeviceDtypeModuleMixin):
            module._device = devices[0]


def state_to_parameters(optimizers: Iterable[Optimizer]) -> None:
    """Move optimizer state to where its parameter lies (Lightning moves it to one device).

    Optimizers such as LBFGS hold on to their state while they call for a loss, so that it is
    changed in place, and only where it has to be.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in list(state.items()):
                if any(_is_elsewhere(leaf, parameter.device) for _, leaf in leaves(value)):
                    _move(state, key, parameter.device)


@contextmanager
def muted(model: LightningModule) -> Iterator[None]:
    """Context in which what the model logs is dropped."""
    before = {name: vars(model)[name] for name in _LOGS if name in vars(model)}
    vars(model).update(dict.fromkeys(_LOGS, _nothing))
    try:
        yield
    finally:
        for name in _LOGS:
            del vars(model)[name]
        vars(model).update(before)


_LOGS = ("log", "log_dict", "print")


def _nothing(*_: Any, **__: Any) -> None:
    """Neither log nor print."""


def _is_elsewhere(leaf: Any, device: torch.device) -> bool:
    # Scalars such as Adam's `step` stay on the CPU, where optimizers count them.
    return isinstance(leaf, Tensor) and bool(leaf.dim()) and leaf.device != device


def _move(holder: Any, key: Any, device: torch.device) -> None:
    value = holder[key]
    if isinstance(value, list):
        for index in range(len(value)):
            _move(value, index, device)
    else:
        holder[key] = map_leaves(
            lambda leaf: leaf.to(device) if _is_elsewhere(leaf, device) else leaf, value
        )
