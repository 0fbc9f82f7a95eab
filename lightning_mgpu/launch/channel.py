"""Messages between the caller and one worker, over a private pair of sockets."""

import array
import mmap
import pickle
import socket
import struct
import threading
from contextlib import suppress
from pickle import PickleBuffer
from typing import Any

import cloudpickle

# Sizes of the pickle and of the table of buffer sizes that follows it.
_HEADER = struct.Struct("!QQ")
_SIZE = struct.Struct("!Q")


class Channel:
    """Sends and receives whole objects, each with at most one open file beside it.

    A `pickle.PickleBuffer` within an object is sent from where it lies, without a copy, and
    arrives as a writable `mmap.mmap`.

    Both ends trust each other: the sockets are a private pair and never listen.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """A channel for this process and the bare socket for the other one."""
        ours, theirs = socket.socketpair()
        # As much as the system gives: the less often do the two have to wake each other.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        return cls(ours), theirs

    def fileno(self) -> int:
        """File descriptor, for `selectors`."""
        return self._socket.fileno()

    def send(self, message: Any, file: int | None = None) -> None:
        """Send `message`; the other side gets a copy of the descriptor `file`.

        Raises:
            OSError: The other side is gone.
        """
        buffers: list[PickleBuffer] = []
        data = cloudpickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = b"".join(_SIZE.pack(view.nbytes) for view in views)
        rights = []
        if file is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        with self._sending:
            self._socket.sendmsg([_HEADER.pack(len(data), len(sizes))], rights)
            for part in (data, sizes, *views):
                self._socket.sendall(part)

    def receive(self) -> tuple[Any, int | None]:
        """Wait for a message and the descriptor that came with it.

        Raises:
            EOFError: The other side is gone.
        """
        try:
            header, files, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
            header += self._read(_HEADER.size - len(header)) if header else b""
            if not header:
                raise EOFError
            data_size, table_size = _HEADER.unpack(header)
            data, table = self._read(data_size), self._read(table_size)
            buffers = [_fresh_memory(size) for (size,) in _SIZE.iter_unpack(table)]
            for buffer in buffers:
                self._read_into(memoryview(buffer))
        except OSError as error:
            raise EOFError from error
        return pickle.loads(data, buffers=buffers), files[0] if files else None

    def close(self) -> None:
        """Close this end; the other side reads end of file."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]


def _fresh_memory(size: int) -> mmap.mmap:
    """Anonymous memory, in huge pages where available, which halves the time to fill it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
