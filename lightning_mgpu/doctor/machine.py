"""Cores, memory and limits of the machine and of a container."""

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from lightning_mgpu.doctor.finding import Finding, ok, warn
from lightning_mgpu.format import readable_bytes

ROOT = Path("/")
_FEW_FILES = 1024  # a pool, its DataLoader workers and Ray have hundreds of pipes and sockets open
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 if there is no limit


def cores(root: Path = ROOT) -> Iterator[Finding]:
    """Cores that this process may use."""
    there, usable = os.cpu_count() or 1, usable_cores(root)
    if usable < there:
        yield warn(
            "cores",
            f"{usable:g} of the machine's {there}: a container's limit, or an affinity",
            f"Libraries may start a thread for each of the {there}. Set OMP_NUM_THREADS, and no"
            f" more DataLoader workers than {max(int(usable), 1)}.",
            usable=usable,
            machine=there,
        )
    else:
        yield ok("cores", str(there), usable=usable, machine=there)


def threads(
    ranks: int, environment: Mapping[str, str] = os.environ, root: Path = ROOT
) -> Iterator[Finding]:
    """Threads that all ranks have together, against the cores."""
    usable, text = usable_cores(root), environment.get("OMP_NUM_THREADS", "")
    if not text:
        yield ok("threads", f"OMP_NUM_THREADS is not set: torch chooses, for {usable:g} cores")
    elif not text.isdigit():
        yield warn("threads", f"OMP_NUM_THREADS={text}", "Set it to a whole number, or unset it.")
    elif int(text) * ranks > usable:
        yield warn(
            "threads",
            f"OMP_NUM_THREADS={text} in each of {ranks} ranks, on {usable:g} cores",
            f"Threads wait for each other. OMP_NUM_THREADS={max(int(usable // ranks), 1)}",
        )
    else:
        yield ok("threads", f"OMP_NUM_THREADS={text}, {ranks} ranks, {usable:g} cores")


def memory(root: Path = ROOT) -> Iterator[Finding]:
    """Memory of the machine, and the container's limit of it."""
    values = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    total, free = (int(values[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit = _limit(root)
    found = f"{readable_bytes(free)} free of {readable_bytes(total)}"
    if limit is not None and limit < total:
        yield warn(
            "memory",
            f"{found}, but this container may use {readable_bytes(limit)}",
            "What asks for more is killed without an error. Give the container more memory"
            " (`docker run --memory`), or use fewer DataLoader workers and smaller batches.",
            total=total,
            free=free,
            limit=limit,
        )
    else:
        yield ok("memory", found, total=total, free=free)


def open_files() -> Iterator[Finding]:
    """Open files that a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if 0 <= soft < _FEW_FILES:
        yield warn(
            "open files",
            f"{soft} (ulimit -n), at most {most}",
            f"Ranks, DataLoader workers and Ray need more: `ulimit -n {_wanted(hard)}` before you"
            " start" + (", which root has to allow." if 0 <= hard < _FEW_FILES else "."),
            soft=soft,
            hard=hard,
        )
    else:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        yield ok("open files", f"{shown} (ulimit -n)", soft=soft, hard=hard)


def _wanted(hard: int) -> int:
    return min(hard, 65536) if hard >= _FEW_FILES else 65536


def usable_cores(root: Path = ROOT) -> float:
    """Cores that this process may use: by its affinity, and by the container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota(root)
    return min(allowed or 1, quota) if quota is not None else allowed or 1


def is_container(root: Path = ROOT) -> bool:
    """Return whether this is a container of Docker, Podman or Kubernetes."""
    files = (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io")
    return any((root / file).exists() for file in files)


def _quota(root: Path) -> float | None:
    found = []
    for folder in _cgroups(root, "cpu"):
        words = (_text(folder / "cpu.max") or "max").split()
        quota = int(_text(folder / "cpu.cfs_quota_us") or -1)
        if words[0] != "max":
            found.append(int(words[0]) / int(words[1]))
        elif quota > 0:
            found.append(quota / int(_text(folder / "cpu.cfs_period_us") or 100_000))
    return min(found, default=None)


def _limit(root: Path) -> int | None:
    found = []
    for folder in _cgroups(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / file)
            if text and text != "max" and int(text) < _UNLIMITED:
                found.append(int(text))
    return min(found, default=None)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those around it, in both versions."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = top / path.strip("/")
        # A container may see the path that it has outside, but not the folder.
        yield from (inner, *(above for above in inner.parents if above.is_relative_to(top)))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
