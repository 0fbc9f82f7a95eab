"""Pickler for objects sent to another process."""

import importlib
import io
import sys
from types import ModuleType
from typing import Any

import cloudpickle

from lightning_mgpu._compat.torch_pickling import reduce_loader
from lightning_mgpu.launch.main_script import reduce_by_name


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickle what `pickle` cannot: lambdas, `__main__`, a `DataLoader` in use."""

    def reducer_override(self, obj: Any) -> Any:
        # Persistent workers of a loader belong to this process.
        reduced = reduce_loader(obj) or reduce_by_name(obj)
        if reduced is not None:
            return reduced
        if _is_special_module(obj):
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)


def dumps(obj: Any) -> bytes:
    """The object, pickled."""
    stream = io.BytesIO()
    Pickler(stream).dump(obj)
    return stream.getvalue()


def _is_special_module(obj: Any) -> bool:
    """Return whether `obj` is a module with its own class, like `torch.backends.cudnn`.

    cloudpickle pickles plain modules only.
    """
    return (
        isinstance(obj, ModuleType)
        and type(obj) is not ModuleType
        and sys.modules.get(obj.__name__) is obj
    )
