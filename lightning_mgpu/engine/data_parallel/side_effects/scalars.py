"""Numbers and tensors that replicas have added to, as the rules for merging them compare them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.data_parallel.copying.tracked_numbers import is_number

_TOLERANCE = 1e-6


def together(values: Sequence[Any], like: Any) -> list[Any]:
    """Tensors on the device of the first."""
    device = next((v.device for v in (like, *values) if isinstance(v, Tensor)), None)
    return [v.detach().to(device) if isinstance(v, Tensor) else v for v in values]


def is_scalar(value: Any) -> bool:
    """Return whether `value` is a real number, or a tensor of one."""
    return is_number(value) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )


def is_scalar_like(value: Any) -> bool:
    """Return whether `value` is a number, or a tensor that can be summed."""
    return is_number(value) or (isinstance(value, Tensor) and value.dtype != torch.bool)


def is_integer(value: Any) -> bool:
    """Return whether a tensor has an integer type, or a number no fraction and is no float."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return not isinstance(value, float) and float(value).is_integer()


def number(value: Any) -> float:
    """Convert a number, or the sum of a tensor."""
    return float(value.detach().sum()) if isinstance(value, Tensor) else float(value)


def is_whole(number: float) -> bool:
    """Return whether a finite number has no fraction."""
    return math.isfinite(number) and number == int(number)


def close(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether numbers agree, pair by pair, to a relative tolerance of 1e-6."""
    return all(
        math.isclose(x, y, rel_tol=_TOLERANCE, abs_tol=0.0) for x, y in zip(a, b, strict=True)
    )


def copied(value: Any) -> Any:
    """Copy a tensor; return anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value
