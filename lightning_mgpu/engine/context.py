"""What torch keeps per thread, carried from the caller to a worker."""

import contextvars
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

__all__: list[str] = []


# Kinds of which there is but one device.
_SINGLE = ("cpu", "meta")


def make_current(device: torch.device) -> None:
    """Have a device be the calling thread's current one of its kind."""
    if device.type not in _SINGLE:
        torch.get_device_module(device).set_device(device)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """A context in which a device is the current one of its kind."""
    if device.type in _SINGLE:
        return nullcontext()
    made: AbstractContextManager[None] = torch.get_device_module(device).device(device)
    return made


@dataclass(frozen=True)
class ThreadContext:
    """The thread-local state of one thread, to be entered in others.

    Gradient mode, inference mode, autocast, the default device and context variables are a
    thread's own. (Default dtype, determinism and anomaly detection are the process's.)
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_device: torch.device | None
    variables: contextvars.Context

    @classmethod
    def capture(cls) -> "ThreadContext":
        """The calling thread's state."""
        kinds = {"cpu"}
        if torch.accelerator.is_available():
            kinds.add(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        device = torch.get_default_device()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (kind, torch.get_autocast_dtype(kind))
                for kind in sorted(kinds)
                if torch.is_autocast_enabled(kind)
            ),
            device if device.type != "cpu" else None,
            contextvars.copy_context(),
        )

    @contextmanager
    def entered(self, device: torch.device) -> Iterator[None]:
        """Take the state over in this thread, with `device` as the current one of its kind.

        Context variables are not entered; run in `variables.copy()` for them.
        """
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                # The cache of casted weights is shared by all threads, and weights change.
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            if self.default_device is not None:
                stack.enter_context(torch.device(self.default_device))
            yield
