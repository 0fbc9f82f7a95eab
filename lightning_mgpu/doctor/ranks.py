"""Collectives between processes: gloo, and NCCL where there are GPUs. This check runs apart."""

import multiprocessing
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module

from lightning_mgpu.doctor.finding import Finding, bad, ok, warn
from lightning_mgpu.errors import one_line

_SECONDS = 8.0  # for ranks to find each other, which takes one; the check itself has more


def collectives() -> Iterator[Finding]:
    """An ``all_reduce`` over each backend that can be used here, and its result."""
    try:
        import_module("torch")
    except Exception:  # which has a line of its own
        yield warn("gloo", "not tried, since torch does not load", "See the line of torch.")
        return
    yield tried("gloo", 2)
    from lightning_mgpu.doctor.devices import accelerators

    gpus = [device for device in accelerators() if device.type == "cuda"]
    if gpus:
        yield tried("nccl", len(gpus))


def tried(backend: str, ranks: int) -> Finding:
    """Add up one number of each rank, in processes on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_rank, args=(backend, rank, ranks, port), daemon=True)
        for rank in range(1, ranks)
    ]
    for process in others:
        process.start()
    try:
        total = _rank(backend, 0, ranks, port)
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error, 300)}"
        return bad(backend, text, _advice(backend))
    finally:
        for process in others:
            process.kill()
            process.join()
    expected = ranks * (ranks + 1) // 2
    if total != expected:
        return bad(backend, f"all_reduce gave {total}, not {expected}", _advice(backend))
    return ok(backend, f"all_reduce of {ranks} {'ranks' if ranks > 1 else 'rank'} is right")


def _advice(backend: str) -> str:
    name = backend.upper()
    more = ", and NCCL_P2P_DISABLE=1" if backend == "nccl" else ""
    return f"`strategy=ddp` cannot work. Try {name}_SOCKET_IFNAME=lo{more}; see `host name`."


def _rank(backend: str, rank: int, ranks: int, port: int) -> float:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from torch import distributed

    from lightning_mgpu.engine.device import HOST, make_current

    device = torch.device("cuda", rank) if backend == "nccl" else HOST
    make_current(device)
    distributed.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=_SECONDS),
    )
    number = torch.full((1,), float(rank + 1), device=device)
    distributed.all_reduce(number)
    total = float(number.item())
    distributed.barrier()  # nobody is killed before all have the result
    distributed.destroy_process_group()
    return total
