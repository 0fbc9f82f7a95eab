"""Device-specific operations. No other module of engine or strategies asks for a device's kind.

The CPU has one device, no streams and nothing to wait for. Accelerators are addressed by what
`torch.accelerator` and their device modules have in common; tried on CUDA.

All slots on a device work on one stream there, the one that is current where the work is asked for:
what one thread allocates and another frees needs no ``record_stream``, and copies are in order.
"""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_mgpu._compat.torch import (
    device_generators,
    put_device_generators,
    put_host_generator,
)

HOST = torch.device("cpu")
# Kinds of which there is but one device.
_SINGLE = ("cpu", "meta", "mps")


def is_accelerator(device: torch.device) -> bool:
    """Return whether a device computes asynchronously to the host."""
    return device.type not in ("cpu", "meta")


def indexed(device: torch.device) -> torch.device:
    """A device with its number: that of the thread's current one of its kind, if it has none."""
    if device.type in _SINGLE:
        return device
    module = torch.get_device_module(device)
    number = module.current_device() if device.index is None else device.index
    return torch.device(device.type, number)


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


def side_streams(devices: Iterable[torch.device]) -> tuple[Any, ...]:
    """The calling thread's current streams, but for those that are current in a new thread."""
    found = []
    for device in dict.fromkeys(devices):
        if device.type not in _SINGLE:
            module = torch.get_device_module(device)
            stream = module.current_stream(device)
            if hasattr(module, "default_stream") and stream != module.default_stream(device):
                found.append(stream)
    return tuple(found)


def on_stream(stream: Any) -> AbstractContextManager[None]:
    """A context in which a stream is the current one of its device."""
    made: AbstractContextManager[None] = torch.get_device_module(stream.device).stream(stream)
    return made


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, for whoever computes next there.

    The host waits where it is the target alone: else it could read what has not arrived yet.
    """
    return tensor.to(device, non_blocking=is_accelerator(device))


def copy_into(target: Tensor, source: Tensor) -> None:
    """Write a tensor's values to another, as `copied` does."""
    target.copy_(source, non_blocking=is_accelerator(target.device))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast dtype of the calling thread on a device; `None` if autocast is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast_kinds() -> tuple[str, ...]:
    """The kinds of devices that this process may cast operations of."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (HOST.type,) if accelerator is None else (HOST.type, accelerator.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off on a device."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rounds_float32(device: torch.device) -> bool:
    """Return whether a device may round ``float32`` to fewer bits (TF32)."""
    return device.type == "cuda" and (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    )


def has_float64(device: torch.device) -> bool:
    """Return whether a device can compute in double precision."""
    return device.type != "mps"


def default_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device, even while another has replaced it."""
    if not is_accelerator(device):
        return torch.default_generator
    if device not in _default_generators:
        module = torch.get_device_module(device)
        _default_generators[device] = device_generators(module)[indexed(device).index]
    return _default_generators[device]


def put_generator(device: torch.device, generator: Any) -> None:
    """Have torch's own functions, such as `torch.get_rng_state`, use this for a device's own."""
    if not is_accelerator(device):
        put_host_generator(generator)
        return
    default_generator(device)  # before it is out of reach
    module = torch.get_device_module(device)
    own = list(device_generators(module))
    own[indexed(device).index] = generator
    put_device_generators(module, own)


_default_generators: dict[torch.device, torch.Generator] = {}


def random_state(device: torch.device) -> Tensor | None:
    """The state of a device's own generator; `None` if it has none beside the host's."""
    if not is_accelerator(device):
        return None
    with on_device(device):
        state: Tensor = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(device: torch.device, state: Tensor | None) -> None:
    """Put a device's own generator back to where it was."""
    if state is not None:
        with on_device(device):
            torch.get_device_module(device).set_rng_state(state)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until devices have done what they were asked for."""
    for device in dict.fromkeys(devices):
        if is_accelerator(device):
            with on_device(device):
                torch.get_device_module(device).synchronize()


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """The most bytes that tensors have had on a device at once, and all that it has.

    `None` for a device that cannot tell.
    """
    if not is_accelerator(device):
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    return int(module.max_memory_allocated(device)), int(module.mem_get_info(device)[1])


def release_memory(devices: Iterable[torch.device]) -> None:
    """Give back memory that torch keeps for later on devices, but that no tensor has."""
    for device in dict.fromkeys(devices):
        if is_accelerator(device):
            with on_device(device):
                torch.get_device_module(device).empty_cache()


class Clock(Protocol):
    """Clock of a device."""

    def now(self) -> Any:
        """A stamp of what the calling thread's device has reached."""

    def seconds(self, stamp: Any) -> float:
        """A stamp as a time of `time.perf_counter`."""


class _HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, stamp: float) -> float:
        return stamp


class _EventClock:
    """Clock made of CUDA-style events, which the host reads without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.get_device_module(device).Event
        synchronize([device])
        self._zero = self.now()
        self._zero.synchronize()
        self._zero_seconds = time.perf_counter()

    def now(self) -> Any:
        event = self._event(enable_timing=True)
        with on_device(self._device):
            event.record()
        return event

    def seconds(self, stamp: Any) -> float:
        stamp.synchronize()
        milliseconds: float = self._zero.elapsed_time(stamp)
        return self._zero_seconds + milliseconds / 1e3


def clock(device: torch.device) -> Clock:
    """Clock for a device."""
    return _EventClock(device) if is_accelerator(device) else _HostClock()
