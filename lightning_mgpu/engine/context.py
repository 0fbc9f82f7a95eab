"""Carry torch's per-thread settings from the caller to a worker."""

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_mgpu.engine import device as kinds
from lightning_mgpu.engine.dispatch import CarriedMode, innermost


@dataclass(frozen=True)
class ThreadContext:
    """Thread-local state of one thread, to be entered in others.

    Gradient mode, inference mode, autocast, the default device, current streams, dispatch modes and
    context variables are a thread's own. (Default dtype, determinism and anomaly detection are the
    process's.)
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_device: torch.device | None
    streams: tuple[Any, ...]
    mode: CarriedMode | None
    variables: contextvars.Context

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = ()) -> "ThreadContext":
        """The calling thread's state.

        Args:
            devices: Whose current streams are part of it.
        """
        device = torch.get_default_device()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (kind, torch.get_autocast_dtype(kind))
                for kind in kinds.autocast_kinds()
                if torch.is_autocast_enabled(kind)
            ),
            device if device != kinds.HOST else None,
            kinds.side_streams(devices),
            innermost(CarriedMode),
            contextvars.copy_context(),
        )

    @contextmanager
    def entered(self, device: torch.device) -> Iterator[None]:
        """Take the state over in this thread, with `device` as the current one of its kind.

        Context variables are not entered; run in `variables.copy()` for them.
        """
        with ExitStack() as stack:
            if self.mode is not None and innermost(CarriedMode) is None:
                stack.enter_context(self.mode.for_thread())
            for stream in self.streams:
                stack.enter_context(kinds.on_stream(stream))
            stack.enter_context(kinds.on_device(device))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                # The cache of casted weights is shared by all threads, and weights change.
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            if self.default_device is not None:
                stack.enter_context(torch.device(self.default_device))
            yield
