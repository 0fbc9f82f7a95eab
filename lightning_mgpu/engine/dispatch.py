"""Base class of our dispatch modes."""

from typing import TypeVar

from lightning_mgpu._compat.torch import TorchDispatchMode, dispatch_modes


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that sees the operations of eager code; compiled code stays compiled and unseen."""

    # Both are as torch's, which have no types.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class CarriedMode(EagerMode):
    """Mode that worker threads enter as well while they work for a caller who has entered it."""

    def for_thread(self) -> "CarriedMode":
        """The mode that the calling thread enters: this one, or one of its own."""
        return self


Mode = TypeVar("Mode", bound=EagerMode)


def innermost(kind: type[Mode]) -> Mode | None:
    """The mode of a kind that was entered last, here or where this thread has its state from."""
    entered = reversed(dispatch_modes())
    return next((mode for mode in entered if isinstance(mode, kind)), None)
