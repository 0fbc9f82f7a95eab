"""The part that our dispatch modes have in common."""

from torch.utils._python_dispatch import TorchDispatchMode

__all__: list[str] = []


class EagerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations of eager code; what has been compiled stays compiled, and unseen."""

    # Both are as torch's, which have no types.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True
