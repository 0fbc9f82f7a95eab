"""Torch, Lightning, the devices, and copies between them. These checks run apart."""

import time
from collections.abc import Iterator
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mgpu.doctor.finding import Finding, bad, ok, warn
from lightning_mgpu.doctor.versions import is_malicious
from lightning_mgpu.errors import one_line
from lightning_mgpu.format import readable_bytes

if TYPE_CHECKING:
    import torch

_COPIED = 32 << 20  # bytes: enough to see the speed, and what is lost in parts
_LITTLE_FREE = 0.5  # of a device's memory; with less, another program is using it
_WRONG = (
    "Training over both gives wrong numbers. Switch off the IOMMU in the BIOS or update the driver;"
    " for `ddp`, set NCCL_P2P_DISABLE=1. Until then use one of them."
)
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))


def installed() -> Iterator[Finding]:
    """Whether torch and Lightning can be imported, and the devices that torch sees."""
    error = _import("torch")
    if error is not None:
        yield error
    else:
        yield from _devices()
    if is_malicious("lightning"):
        return  # importing it would run its code
    if error is None:
        lightning = _import("lightning.pytorch")
        yield lightning if lightning is not None else ok("lightning loads", "yes")


def copies() -> Iterator[Finding]:
    """Copies between each ordered pair of devices, compared bit by bit, and timed."""
    if _import("torch") is not None:
        yield warn("copies", "not tried, since torch does not load", "See the line of torch.")
        return
    from lightning_mgpu.engine.device import HOST

    found = [HOST, *accelerators()]
    if len(found) == 1:
        yield ok("copies", "not tried: there is no accelerator to copy to")
    else:
        yield from compare_copies(found)


def compare_copies(devices: "list[torch.device]") -> Iterator[Finding]:
    """Copy the same bytes between each ordered pair of devices."""
    import torch

    from lightning_mgpu.engine.device import HOST, copied, synchronize

    expected = torch.randint(256, (_COPIED,), dtype=torch.uint8)
    speeds: dict[str, float] = {}
    wrong = 0
    for source, target in permutations(devices, 2):
        name = f"{source} -> {target}"
        try:
            given = expected.to(source)
            copied(given, target)  # the first one starts the driver and takes memory
            synchronize([source, target])
            start = time.perf_counter()
            arrived = copied(given, target)
            synchronize([source, target])
            speeds[name] = _COPIED / (time.perf_counter() - start)
            differ = int((arrived.to(HOST) != expected).sum())
        except RuntimeError as error:
            wrong += 1
            yield bad("copies", f"{name}: {one_line(error, 300)}", "See `nvidia-smi`.")
            continue
        if differ:
            wrong += 1
            yield bad("copies", f"{name}: {differ} of {_COPIED} bytes arrive wrong", _WRONG)
    if not wrong:
        slowest = min(speeds, key=lambda name: speeds[name])
        yield ok(
            "copies",
            f"{len(speeds)} pairs, all bits arrive; slowest {slowest}:"
            f" {readable_bytes(speeds[slowest])}/s",
            bytes_per_second=speeds,
        )


def accelerators() -> "list[torch.device]":
    """All accelerators that torch sees."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    return [torch.device(kind.type, number) for number in range(torch.accelerator.device_count())]


def _devices() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda or torch.version.hip
    yield ok("torch loads", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        found = accelerators()
    except RuntimeError as error:  # a driver that does not fit
        yield bad("devices", one_line(error, 300), "See `nvidia-smi`, and update the driver.")
        return
    if not found:
        text = f"none; torch is built for {'CUDA or ROCm ' + built if built else 'the CPU'}"
        if _has_driver():
            advice = (
                "Training is on the CPU, though there is a GPU's driver. See CUDA_VISIBLE_DEVICES"
                " and `nvidia-smi`."
                if built
                else "There is a GPU's driver: install a torch for it, https://pytorch.org."
            )
            yield warn("devices", text, advice)
        else:
            yield ok("devices", text)
    for device in found:
        yield _described(device)


def _has_driver() -> bool:
    return any(file.exists() for file in _DRIVERS)


def _described(device: "torch.device") -> Finding:
    import torch

    module: Any = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    if not hasattr(module, "mem_get_info"):
        return ok(str(device), name)
    free, total = module.mem_get_info(device)
    text = f"{name}, {readable_bytes(free)} free of {readable_bytes(total)}"
    if free < _LITTLE_FREE * total:
        advice = "Another program uses it: see `nvidia-smi`, and end what you do not need."
        return warn(str(device), text, advice, free=free, total=total)
    return ok(str(device), text, free=free, total=total)


def _import(module: str) -> Finding | None:
    """Import a module, and make a finding of its error."""
    name = module.split(".")[0]
    try:
        import_module(module)
    except Exception as error:  # a shared library that does not fit raises OSError
        return bad(
            f"{name} loads",
            f"{type(error).__name__}: {one_line(error, 300)}",
            f"Install it anew: `pip install --force-reinstall {name}`. A file or folder named"
            f" `{name}` in this directory or on PYTHONPATH would hide it.",
        )
    return None
