"""A kind of device of the tests' own: `SLOTS`, on which tensors compute for real, on the CPU.

An operation on tensors of several of them, or of one and the host, is an error, as on GPUs; on the
CPU alone a forgotten copy would go unnoticed. Scalars may lie on the host. (Fake tensors of two
GPUs have no backward without a GPU; those of ``meta`` devices have, and can be told apart.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

HOST = torch.device("cpu")
SLOTS = [torch.device("meta", index) for index in range(3)]
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn")


class WrongSlotError(RuntimeError):
    """Tensors of several devices meet in an operation."""


class Placed(Tensor):
    """A tensor on one of `SLOTS`, whose numbers are those of a tensor on the CPU."""

    # (Not in `vars`, which an alias of a parameter takes over from it.)
    __slots__ = ("values",)
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> "Placed":
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.values}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = _target(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = HOST
        output = func(
            *tree_map_only(Placed, _values, args), **tree_map_only(Placed, _values, kwargs)
        )
        if func._schema.is_mutable and isinstance(args[0], Placed):
            return args[0]
        return tree_map_only(Tensor, lambda tensor: put(tensor, target), output)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor's values on a device, in the same memory."""
    if isinstance(tensor, Placed):
        tensor = tensor.values
    return tensor if device == HOST else Placed(tensor.detach(), device)


def put_module(module: nn.Module, where: dict[int, torch.device]) -> None:
    """Put each tensor of a module on its device, given by its `id`; all others on the first."""
    known: dict[int, Tensor] = {}
    for inner in module.modules():
        for holder in (inner._parameters, inner._buffers):
            for name, tensor in list(holder.items()):
                if tensor is None or isinstance(tensor, Placed):
                    continue
                if id(tensor) not in known:
                    placed = put(tensor, where.get(id(tensor), SLOTS[0]))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = (
                        nn.Parameter(placed, tensor.requires_grad) if is_parameter else placed
                    )
                holder[name] = known[id(tensor)]


def taken(tensor: Tensor) -> Tensor:
    """A tensor on the CPU with the same values."""
    return tensor.values if isinstance(tensor, Placed) else tensor


@contextmanager
def factories() -> Iterator[None]:
    """Within, torch's functions can make tensors on `SLOTS`."""

    def making(make: Any) -> Any:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if device is None or torch.device(device) not in SLOTS:
                return make(*args, device=device, **kwargs)
            return put(make(*args, device=HOST, **kwargs), torch.device(device))

        return made

    with patch.multiple(torch, **{name: making(getattr(torch, name)) for name in _FACTORIES}):
        yield


def _target(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where an operation's output lies.

    Raises:
        WrongSlotError: Its tensors lie on several devices.
    """
    if func is torch.ops.aten._to_copy.default:
        return torch.device(kwargs.get("device") or args[0].device)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func is not torch.ops.aten.copy_.default:
        devices = {t.device for t in tensors if isinstance(t, Placed) or t.dim()}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise WrongSlotError(f"`{func}` is called with tensors on {names}")
    own = next(tensor.device for tensor in tensors if isinstance(tensor, Placed))
    return torch.device(kwargs.get("device") or own)


def _values(tensor: Placed) -> Tensor:
    return tensor.values
