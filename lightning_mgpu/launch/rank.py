"""One rank's place in a launch, and the process group it joins."""

import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from lightning_mgpu._compat.torch import abort_communicators, forget_failed_group

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Rank:
    """One rank's place in a launch, passed to the launched function.

    Attributes:
        rank: 0 in the calling process, 1 to `world_size - 1` in the workers.
        world_size: Number of processes, the calling one included.
        port: Where rank 0's rendezvous store listens.
        host: Its address.
    """

    rank: int
    world_size: int
    port: int = 0
    host: str = LOOPBACK

    def join_group(
        self,
        backend: str,
        timeout: timedelta,
        device_id: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialise the default process group of this launch. Nothing goes to `os.environ`.

        Args:
            backend: As in `torch.distributed.init_process_group`.
            timeout: How long a collective may wait for the other ranks.
            device_id: The accelerator this rank is bound to; `None` on the CPU.
            **kwargs: Handed on to `torch.distributed.init_process_group`.
        """
        store = TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        dist.init_process_group(
            backend,
            store=PrefixStore("default_pg", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=device_id,
            **kwargs,
        )
        self._wait_for_all(PrefixStore("joined", store))

    def _wait_for_all(self, store: Any) -> None:
        """Return when every rank has joined.

        One that failed sooner would be gone while Gloo connects another to it, which then waits for
        the whole timeout, in native code. A wait for the store ends with the rendezvous.
        """
        if store.add("count", 1) == self.world_size:
            store.set("all", "joined")
        store.wait(["all"])


class Rendezvous:
    """Store through which the ranks of one launch find each other.

    It listens on a port that the kernel picked and that stays ours until `close`. Closing it also
    frees a rank that waits for a peer which will never come: its connection breaks.

    Args:
        host: The address to listen on.
    """

    def __init__(self, host: str = LOOPBACK) -> None:
        listener = socket.create_server((host, 0), backlog=256)
        self.port: int = listener.getsockname()[1]
        arguments: dict[str, Any] = {
            "host_name": host,
            "port": self.port,
            "is_master": True,
            "wait_for_workers": False,
            "master_listen_fd": listener.detach(),
        }
        self._store: TCPStore | None
        try:
            self._store = TCPStore(**arguments)
        except NotImplementedError:  # torch 2.6: libuv's server does not take a listening socket
            self._store = TCPStore(**arguments, use_libuv=False)

    def close(self) -> None:
        """Stop listening. May be called from any thread, and twice."""
        self._store = None

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GroupGuard:
    """Context that restores `torch.distributed` and `sys.excepthook`, however it ends."""

    def __enter__(self) -> "GroupGuard":
        # Every `init_process_group` wraps the hook anew.
        self._excepthook = sys.excepthook
        return self

    def __exit__(self, *_: object) -> None:
        leave_group()
        sys.excepthook = self._excepthook


def leave_group(wait: bool = True) -> None:
    """Destroy the default process group, also one whose initialisation failed half-way.

    Args:
        wait: For Gloo's threads as well; they look up every 10 ms only.
    """
    if dist.is_initialized():
        last_hold = [dist.group.WORLD]
        dist.destroy_process_group()
        if not wait:
            # Nothing in Python waits for this but the interpreter's end.
            threading.Thread(target=last_hold.clear, name="mgpu-leave").start()
    forget_failed_group()


def abort_group() -> None:
    """Abort an NCCL group whose peers are gone, from any thread, and release its waiters.

    Gloo needs none of this: its collectives end with their connections.
    """
    with _aborting:
        if dist.is_initialized() and "nccl" in dist.get_backend_config():
            abort_communicators()


_aborting = threading.Lock()
