"""Code between units: move operands of its operations to the current segment first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_mgpu._compat.torch import innermost_function_mode

Fit = Callable[[Tensor], Tensor]


class Glue(TorchFunctionMode):
    """Mode in which operations of the calling thread get tensors of the current segment.

    Args:
        fit: Finds what stands for a tensor that an operation reads.
        fit_written: The same for one that it writes to.
    """

    def __init__(self, fit: Fit, fit_written: Fit) -> None:
        super().__init__()
        self._fit, self._fit_written = fit, fit_written
        self._paused: list[bool] = []

    def pause(self) -> None:
        """Stop intercepting operations until `resume`; may be nested."""
        on_top = innermost_function_mode() is self
        if on_top:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._paused.append(on_top)

    def resume(self) -> None:
        """Undo the last `pause`."""
        if self._paused.pop():
            self.__enter__()  # type: ignore[no-untyped-call]

    def resume_all(self) -> None:
        """Undo every `pause`."""
        while self._paused:
            self.resume()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or _only_asks(func):
            return func(*args, **kwargs)
        if _writes(func, kwargs):
            rest = tuple(self._fitted(value) for value in args[1:])
            args = (self._written(args[0]), *rest) if args else args
            kwargs = {
                key: self._written(value) if key == "out" else self._fitted(value)
                for key, value in kwargs.items()
            }
            return func(*args, **kwargs)
        return func(
            *[self._fitted(value) for value in args],
            **{key: self._fitted(value) for key, value in kwargs.items()},
        )

    def _fitted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._fit(value)
        if type(value) in (list, tuple):
            return type(value)(self._fitted(part) for part in value)
        if type(value) is dict:
            return {key: self._fitted(part) for key, part in value.items()}
        return value

    def _written(self, value: Any) -> Any:
        return self._fit_written(value) if isinstance(value, Tensor) else value


_READING = frozenset(
    {
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.data_ptr),
        *(Tensor.__len__, Tensor.storage_offset, Tensor.__hash__, Tensor.nelement),
        *(Tensor.register_hook, Tensor.retain_grad, Tensor.requires_grad_, Tensor.__repr__),
        *(torch.is_floating_point, torch.is_complex, torch.numel),
    }
)
_TENSOR_PROPERTIES = frozenset(
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")
)
_IN_PLACE = frozenset(
    getattr(Tensor, f"__{name}__")
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
    if hasattr(Tensor, f"__{name}__")
)


def _only_asks(func: Any) -> bool:
    """Return whether a function queries a tensor rather than compute with it."""
    if func in _READING:
        return True
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__") and func not in _TENSOR_PROPERTIES


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (
        (name.endswith("_") and not name.endswith("__"))
        or func in _IN_PLACE
        or kwargs.get("inplace") is True
        or kwargs.get("out") is not None
    )
