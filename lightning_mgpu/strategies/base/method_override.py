"""Have calls of an object's method go through a function first."""

from collections.abc import Callable
from typing import Any

from lightning_mgpu._compat.lightning_attributes import assign


class MethodOverride:
    """A method on an instance, of which copies and pickles have the class's own.

    Several may be put on one method, and be removed in any order.

    Args:
        holder: The instance.
        name: Of the method.
        call: Called in its place, with the method that was there and the arguments.
    """

    def __init__(self, holder: Any, name: str, call: Callable[..., Any]) -> None:
        self._holder, self._name, self._call = holder, name, call
        self._before = vars(holder).get(name)
        self._is_active = True
        # Lightning looks there for the parameters of steps.
        self.__wrapped__: Callable[..., Any] = getattr(holder, name)
        assign(holder, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_active:
            return self._call(self.__wrapped__, *args, **kwargs)
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies are made before they have attributes, so that this finds the class's method.
        return getattr, (self._holder, self._name)

    def remove(self) -> None:
        """Have the method be what it was."""
        self._is_active = False
        top = vars(self._holder).get(self._name)
        while isinstance(top, MethodOverride) and not top._is_active:
            top = top._before
        if top is None:
            vars(self._holder).pop(self._name, None)
        else:
            vars(self._holder)[self._name] = top
