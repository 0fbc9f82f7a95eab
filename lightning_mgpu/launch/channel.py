"""Messages between the caller and one worker, over a private pair of sockets."""

import array
import pickle
import socket
import struct
import threading
from typing import Any

import cloudpickle

__all__: list[str] = []

_HEADER = struct.Struct("!Q")


class Channel:
    """Sends and receives whole objects, each with at most one open file beside it.

    Both ends trust each other: the sockets are a private pair and never listen.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """A channel for this process and the bare socket for the other one."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def send(self, message: Any, file: int | None = None) -> None:
        """Send `message`; `file` is a descriptor that the other side gets a copy of.

        Raises:
            OSError: The other side is gone.
        """
        data = cloudpickle.dumps(message)
        rights = []
        if file is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        with self._sending:
            self._socket.sendmsg([_HEADER.pack(len(data))], rights)
            self._socket.sendall(data)

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
            data = self._read(_HEADER.unpack(header)[0])
        except OSError as error:
            raise EOFError from error
        return pickle.loads(data), files[0] if files else None

    def close(self) -> None:
        """Close this end; the other side reads end of file."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(data)
