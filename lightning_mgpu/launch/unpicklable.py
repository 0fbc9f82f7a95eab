"""Find the attribute that keeps an object from being pickled."""

import functools
import io
import types
from collections.abc import Iterator
from typing import Any

import torch

from lightning_mgpu._compat.torch_modules import BUFFERS, CHILDREN, PARAMETERS
from lightning_mgpu.launch.errors import LaunchError, UnpicklableError
from lightning_mgpu.launch.pickler import Pickler


class _Probe(Pickler):
    """Pickles everything but the tensors' data: fast, and as strict."""

    def persistent_id(self, obj: Any) -> Any:
        return "data" if isinstance(obj, (torch.Tensor, torch.UntypedStorage)) else None


def explain(error: Exception, roots: dict[str, Any]) -> LaunchError:
    """Build the error to raise when pickling `roots` failed with `error`.

    Args:
        error: What the pickler raised.
        roots: The objects that were pickled, each under the name its user knows it by.
    """
    found = find(roots)
    if found is None:
        unwritten = _os_error(error)
        if unwritten is not None:
            return LaunchError(f"Could not write the objects for the workers: {unwritten}.")
        return UnpicklableError(
            f"The objects for the workers cannot be pickled: {error}. {_WAYS_OUT}"
        )
    path, culprit, reason = found
    return UnpicklableError(
        f"`{path}` cannot be pickled, so it cannot be sent to the workers: it holds a"
        f" `{type(culprit).__module__}.{type(culprit).__qualname__}` ({reason}). {_WAYS_OUT}"
    )


_WAYS_OUT = (
    "Create it later (in `setup()` or on first use), leave it out in `__getstate__`,"
    " or start the ranks from outside, where nothing is pickled:"
    " `torchrun --nproc-per-node N your_script.py`."
)


def _os_error(error: BaseException | None) -> OSError | None:
    """The `OSError` behind an error of `torch.save`, which may fail again when it gives up."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def find(roots: dict[str, Any]) -> tuple[str, Any, Exception] | None:
    """Path, object and error of the innermost part that cannot be pickled, if there is one."""
    seen: set[int] = set()
    for name, root in roots.items():
        found = _descend(name, root, seen)
        if found is not None:
            return found
    return None


def _descend(path: str, obj: Any, seen: set[int]) -> tuple[str, Any, Exception] | None:
    error = _pickling_error(obj)
    if error is None or id(obj) in seen:
        return None
    seen.add(id(obj))
    for suffix, child in _children(obj):
        found = _descend(path + suffix, child, seen)
        if found is not None:
            return found
    return path, obj, error


def _pickling_error(obj: Any) -> Exception | None:
    try:
        _Probe(io.BytesIO()).dump(obj)
    except Exception as error:
        return error
    return None


def _children(obj: Any) -> Iterator[tuple[str, Any]]:
    """The parts that pickling `obj` would pickle, each with what to append to the path."""
    if isinstance(obj, dict):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", value) for index, value in enumerate(obj))
    elif isinstance(obj, functools.partial):
        yield from ((f".{part}", getattr(obj, part)) for part in ("func", "args", "keywords"))
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        names = obj.__code__.co_freevars
        cells = zip(names, obj.__closure__ or (), strict=True)
        yield from ((f" -> {name}", cell.cell_contents) for name, cell in cells if _is_filled(cell))
        used = (name for name in obj.__code__.co_names if name in obj.__globals__)
        yield from ((f" -> {name}", obj.__globals__[name]) for name in used)
    else:
        yield from _state(obj)


def _state(obj: Any) -> Iterator[tuple[str, Any]]:
    try:
        state = obj.__reduce_ex__(2)[2]
    except Exception:
        state = getattr(obj, "__dict__", None)
    if isinstance(state, tuple) and all(part is None or isinstance(part, dict) for part in state):
        # Of an object with slots: its dictionary, if any, and its slots.
        state = {name: value for part in state for name, value in (part or {}).items()}
    if not isinstance(state, dict):
        yield from _children(state) if isinstance(state, tuple) else ()
        return
    for key, value in state.items():
        if key in (CHILDREN, PARAMETERS, BUFFERS) and isinstance(value, dict):
            # `model.net`, as the user writes it, instead of `model._modules['net']`.
            yield from ((f".{name}", child) for name, child in value.items())
        else:
            yield f".{key}", value


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
