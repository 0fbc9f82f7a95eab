"""Private names for `torch.save` and DataLoaders. Imports torch when it is called."""

import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.storage import TypedStorage

_ITERATOR = "_iterator"


def reduce_loader(obj: Any) -> tuple[Any, ...] | None:
    """Pickle a `DataLoader` without the iterator that its persistent workers serve.

    Returns:
        As `__reduce_ex__`; `None` for anything that has no such iterator.
    """
    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(obj, data.DataLoader) or obj._iterator is None:
        return None
    function, arguments, state, *rest = obj.__reduce_ex__(2)
    if not isinstance(state, dict) or _ITERATOR not in state:
        raise TypeError(f"the state of a `{type(obj).__name__}` has no `{_ITERATOR}`")
    return function, arguments, {**state, _ITERATOR: None}, *rest


def pickle_module(pickler: type) -> Any:
    """Module-like object for `torch.save(pickle_module=...)`.

    It derives from the pickler a class of its own, whose `persistent_id` claims all storages.
    """
    return SimpleNamespace(Pickler=pickler, __name__="cloudpickle")


identity_of: Callable[["torch.UntypedStorage"], int] = operator.attrgetter("_cdata")
"""By what `torch.save` tells storages apart: the address of the object, not of its memory."""


def is_typed(obj: Any) -> bool:
    """Return whether `obj` is a storage with a dtype, made by `torch.save` of a plain one."""
    storage = sys.modules.get("torch.storage")
    return storage is not None and isinstance(obj, storage.TypedStorage)


def untyped(storage: "TypedStorage") -> "torch.UntypedStorage":
    """The storage behind one with a dtype, without the warning that its public method gives."""
    inner: torch.UntypedStorage = storage._untyped_storage
    return inner


def typed(storage: "torch.UntypedStorage", dtype: "torch.dtype") -> "TypedStorage":
    """A storage with a dtype, without the warning that its constructor gives."""
    from torch.storage import TypedStorage

    make: Callable[..., TypedStorage] = TypedStorage
    return make(wrap_storage=storage, dtype=dtype, _internal=True)
