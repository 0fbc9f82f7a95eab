"""Compare outputs of a whole batch with those of its parts, within the dtype's tolerance."""

import dataclasses
import numbers
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_mgpu.engine.device import has_float64

# Relative to the largest magnitude in a tensor, so that sums over many terms, which depend on
# their order, do not count as different.
_RELATIVE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}
_RELATIVE_HALF = 2e-2

Precision = torch.dtype | float
"""What was computed in; or the relative difference that its rounding explains."""

SINGLE_WITHIN_DOUBLE = 1e-6
"""What single precision explains in part of a model of double precision (a loss, a norm)."""

# What is left of terms that cancel, such as a mean of nearly nothing.
_FLOOR = 0.1
# In a large tensor of integers a few may be the index of the larger of two equal numbers.
_LARGE, _TIES = 1000, 1e-3
# How many entries of a list are looked at for its structure.
_ENTRIES = 32


class ParityError(RuntimeError):
    """A batch computed in parts gives a different result than computed whole."""


@dataclass(frozen=True)
class Difference:
    """One place where the parts differ from the whole.

    Attributes:
        path: How to get there, such as ``output['logits'][0]``.
        text: What differs, such as ``shape (8, 3) instead of (16, 3)``; the parts' value first.
    """

    path: str
    text: str

    def __str__(self) -> str:
        return f"`{self.path}`: {self.text}"


def compare(
    whole: Any, joined: Any, path: str = "output", computed_in: Precision | None = None
) -> list[Difference]:
    """Compare two values of any nesting; objects of unknown kinds are skipped.

    Floating-point numbers may differ by what rounding explains (float64: 1e-9 of the largest
    magnitude in the tensor, float32: 1e-4, less precise: 2e-2); NaN equals NaN. All else must be
    equal.

    Args:
        whole: What the whole batch gave.
        joined: What its parts gave, put together.
        path: What to call the value.
        computed_in: The least precise dtype that was computed in, if less precise than the values'
            own dtypes; under autocast, for instance, the loss is float32 and the layers' outputs
            are not. Or the relative difference that it explains.

    Returns:
        The differences in the order of the structure; empty if there are none.
    """
    return list(_differences(whole, joined, path, computed_in))


def signature(value: Any) -> Hashable:
    """The structure of a batch without its sizes: types, keys, dimensions and dtypes."""
    if isinstance(value, Tensor):
        return (type(value), value.dtype, value.dim())
    parts = parts_of(value)
    if parts is None:
        return (type(value), str(getattr(value, "dtype", "")), len(getattr(value, "shape", ())))
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields"):
        return (type(value), *((name, signature(part)) for name, part in parts.items()))
    # Entries per sample are as many as there are samples.
    kinds = [signature(part) for part in value[:_ENTRIES]]
    return (type(value), *(kind for kind, _ in groupby(kinds)))


def _differences(
    whole: Any, joined: Any, path: str, coarse: Precision | None
) -> Iterator[Difference]:
    parts, others = parts_of(whole), parts_of(joined)
    if parts is not None and others is not None:
        yield from _of_containers(parts, others, path, coarse)
        return
    text: str | None
    a, b = _as_tensor(whole), _as_tensor(joined)
    if a is not None and b is not None:
        text = _of_tensors(a, b, coarse)
    elif _is_known(whole) and _is_known(joined):
        text = _of_values(whole, joined)
    else:
        return
    if text is not None:
        yield Difference(path, text)


def _of_containers(
    whole: dict[str, Any], joined: dict[str, Any], path: str, coarse: Precision | None
) -> Iterator[Difference]:
    if whole.keys() != joined.keys():
        missing = [name for name in whole if name not in joined]
        added = [name for name in joined if name not in whole]
        if all(name.startswith("[") and name[1:-1].isdigit() for name in (*missing, *added)):
            yield Difference(path, f"{len(joined)} entries instead of {len(whole)}")
            return
        texts = [f"without {', '.join(missing)}"] if missing else []
        texts += [f"with {', '.join(added)} in addition"] if added else []
        yield Difference(path, " and ".join(texts))
    for name, part in whole.items():
        if name in joined:
            yield from _differences(part, joined[name], path + name, coarse)


def _of_tensors(whole: Tensor, joined: Tensor, coarse: Precision | None) -> str | None:
    if whole.shape != joined.shape:
        return f"shape {tuple(joined.shape)} instead of {tuple(whole.shape)}"
    if whole.layout is not torch.strided or joined.layout is not torch.strided:
        return None
    if whole.is_meta or joined.is_meta or whole.numel() == 0:
        return None
    joined = joined.detach().to(whole.device)
    floating = [t.dtype for t in (whole, joined) if t.is_floating_point() or t.is_complex()]
    if not floating:
        return _of_integers(whole, joined)
    tolerance = max(_tolerance(dtype) for dtype in (*floating, *([coarse] if coarse else [])))
    return _of_floats(whole.detach(), joined, tolerance)


def _of_integers(whole: Tensor, joined: Tensor) -> str | None:
    count, total = int((whole != joined).sum()), whole.numel()
    if count == 0 or (total >= _LARGE and count <= _TIES * total):
        return None
    if total == 1:
        return f"{joined.item()} instead of {whole.item()}"
    return f"{count} of {total} entries differ"


def _of_floats(whole: Tensor, joined: Tensor, tolerance: float) -> str | None:
    kind = torch.complex128 if whole.is_complex() or joined.is_complex() else torch.float64
    if not has_float64(whole.device):
        whole, joined = whole.cpu(), joined.cpu()
    a, b = whole.to(kind), joined.to(kind)
    nan_a, nan_b = a.isnan(), b.isnan()
    if not torch.equal(nan_a, nan_b):
        if whole.numel() == 1:
            return f"{_shown(joined)} instead of {_shown(whole)}"
        if not bool((nan_a & ~nan_b).any()):
            return "NaN in the parts' only"
        return "NaN in the whole batch's only" if not bool((nan_b & ~nan_a).any()) else "other NaNs"
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite & ~nan_a], b[~finite & ~nan_b]):
        if whole.numel() == 1:
            return f"{_shown(joined)} instead of {_shown(whole)}"
        return "other infinite values"
    if not bool(finite.any()):
        return None
    difference, largest = float((a - b)[finite].abs().max()), float(a[finite].abs().max())
    if difference <= tolerance * max(largest, _FLOOR):
        return None
    if whole.numel() == 1:
        return f"{_shown(joined)} instead of {_shown(whole)}"
    return f"largest difference {difference:.3g} where values are up to {largest:.3g}"


def _of_values(whole: Any, joined: Any) -> str | None:
    try:
        same = bool(whole == joined)
    except Exception:  # arrays of unequal shapes, or something that cannot be compared
        return None
    return None if same else f"{_named(joined)} instead of {_named(whole)}"


def _tolerance(dtype: Precision) -> float:
    return dtype if isinstance(dtype, float) else _RELATIVE.get(dtype, _RELATIVE_HALF)


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor of the same values, if it is a number, or a tensor or array of numbers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, (numbers.Number, float, int)) or hasattr(value, "__array__"):
        return _converted(value)
    return None


def _converted(value: Any) -> Tensor | None:
    try:
        if hasattr(value, "__array__"):
            return torch.as_tensor(value.__array__().copy())
        if isinstance(value, (float, complex)):
            # What `loss.item()` came from is not known.
            return torch.tensor(value, dtype=torch.float64).to(torch.get_default_dtype())
        return torch.tensor(value)
    except Exception:  # texts, dates, objects, integers without limit
        return None


def _is_known(value: Any) -> bool:
    if value is None or isinstance(value, (Tensor, str, bytes, bool, int, float, complex)):
        return True
    if isinstance(value, Set):
        return all(isinstance(entry, (str, bytes, bool, int)) for entry in value)
    return parts_of(value) is not None or hasattr(value, "__array__")


def parts_of(value: Any) -> dict[str, Any] | None:
    """Parts of a container by access path; `None` if it is no container."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {f".{name}": part for name, part in zip(value._fields, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return {f"[{i}]": part for i, part in enumerate(value)}
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {f".{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "__attrs_attrs__"):
        return {f".{a.name}": getattr(value, a.name) for a in value.__attrs_attrs__}
    return None


def _named(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
    if isinstance(value, (str, bytes, bool, int, float, complex)) or value is None:
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    if isinstance(value, (Sequence, Mapping, Set)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return f"a {type(value).__name__}"


def _shown(value: Tensor) -> str:
    number = value.item()
    return f"{number:.6g}" if isinstance(number, (float, complex)) else repr(number)
