"""Where the parts of a split model lie, and the stand-in for the `forward` of its submodule."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mgpu.engine.batch import leaves, map_leaves
from lightning_mgpu.engine.pipelining.cutter import Cut

__all__: list[str] = []


class Override:
    """Stands for a module's `forward` on the instance.

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
        """From now on, `forward` is `call`."""
        self._call = call
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """`forward` is what it was."""
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

    model._apply(moved)  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, _DeviceDtypeModuleMixin):
            module._device = devices[0]


def state_to_parameters(optimizers: Iterable[Optimizer]) -> None:
    """Move optimizer state to where its parameter lies (Lightning moves it to one device)."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            optimizer.state[parameter] = _moved(state, parameter.device)


def step_tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among a step's arguments."""
    return [leaf for _, leaf in leaves(args) if isinstance(leaf, Tensor)]


def _moved(state: Any, device: torch.device) -> Any:
    # Scalars such as Adam's `step` stay on the CPU, where optimizers count them.
    return map_leaves(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) and leaf.dim() else leaf, state
    )
