"""The pickler of what goes to another process."""

import importlib
import io
import sys
from types import ModuleType
from typing import Any, cast

import cloudpickle


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles what `pickle` cannot: lambdas, `__main__`, a `DataLoader` in the middle of use."""

    def reducer_override(self, obj: Any) -> Any:
        if _is_loader(obj) and obj._iterator is not None:
            # Persistent DataLoader workers belong to this process.
            function, arguments, state, *rest = cast("tuple[Any, ...]", obj.__reduce_ex__(2))
            return function, arguments, {**state, "_iterator": None}, *rest
        if _is_special_module(obj):
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def dumps(obj: Any) -> bytes:
    """The object, pickled."""
    stream = io.BytesIO()
    Pickler(stream).dump(obj)
    return stream.getvalue()


def _is_loader(obj: Any) -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(obj, data.DataLoader)


def _is_special_module(obj: Any) -> bool:
    """Whether `obj` is a module of a class of its own, like `torch.backends.cudnn`.

    cloudpickle pickles plain modules only.
    """
    return (
        isinstance(obj, ModuleType)
        and type(obj) is not ModuleType
        and sys.modules.get(obj.__name__) is obj
    )
