"""Shared memory, disks, and the clock of the file system."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_mgpu.doctor.finding import Finding, bad, ok, warn
from lightning_mgpu.doctor.machine import ROOT, is_container
from lightning_mgpu.format import duration, readable_bytes

SHARED_MEMORY = Path("/dev/shm")
# A batch of 64 images of 224 pixels has 38 MB, and each DataLoader worker has two on their way;
# Docker gives 64 MiB for all.
_SMALL_SHARED = 1 << 30
_LITTLE_DISK = 5_000_000_000  # a few checkpoints of a model of 100 million weights, with Adam
_CLOCK = 2.0  # seconds; some file systems know no less than whole ones


def shared_memory(directory: Path = SHARED_MEMORY, root: Path = ROOT) -> Iterator[Finding]:
    """Room in shared memory, through which DataLoader workers hand over batches."""
    more = "docker run --shm-size=8g" if is_container(root) else "mount -o remount,size=8g /dev/shm"
    error = _cannot_write(directory)
    if error is not None:
        advice = "DataLoader workers and NCCL need it. Mount it, and have it writable."
        yield bad("shared memory", f"cannot write: {error}", advice)
        return
    usage = shutil.disk_usage(directory)
    found = f"{readable_bytes(usage.free)} free of {readable_bytes(usage.total)} in {directory}"
    sizes = {"total": usage.total, "free": usage.free}
    if usage.free < _SMALL_SHARED:
        advice = f"DataLoader workers may die of a bus error: `{more}`, or use none."
        yield warn("shared memory", found, advice, **sizes)
    else:
        yield ok("shared memory", found, **sizes)


def disk(name: str, directory: str) -> Iterator[Finding]:
    """Room in a directory that files are written to."""
    error = _cannot_write(Path(directory))
    if error is not None:
        yield bad(name, f"cannot write: {error}", "Choose another directory, or its permissions.")
        return
    usage = shutil.disk_usage(directory)
    found = f"{readable_bytes(usage.free)} free in {directory}"
    sizes = {"total": usage.total, "free": usage.free}
    if usage.free < _LITTLE_DISK:
        where = "TMPDIR" if directory == tempfile.gettempdir() else "hydra.run.dir"
        yield warn(name, found, f"Free some, or set {where} to another disk.", **sizes)
    else:
        yield ok(name, found, **sizes)


def clock(directory: str) -> Iterator[Finding]:
    """The machine's clock against that of the file system, which may be another machine's."""
    if _cannot_write(Path(directory)) is not None:
        yield warn("clock", f"not compared: cannot write in {directory}", "See its disk's line.")
        return
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        apart = os.stat(file.name).st_mtime - time.time()
    if abs(apart) > _CLOCK:
        yield warn(
            "clock",
            f"{duration(abs(apart))} {'behind' if apart > 0 else 'ahead of'} the file system's",
            "Files look older or newer than they are. Set both clocks by NTP (`timedatectl`).",
            seconds=apart,
        )
    else:
        yield ok("clock", f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, as the file system's")


def _cannot_write(directory: Path) -> OSError | None:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return error
    return None
